// How files' chunks come and go: shared by what reads whole checkpoints.
//
// pread and pwrite, not mmap: a disk's error or a file cut short is an errno here, and would be a signal there.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>

#include "soup_files.h"

namespace fastalign {

// 0 when all of it was read or written, else an errno, or -1 where the file ended.
template <typename Call> int whole(Call call, char* data, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t done = call(data, size_t(bytes), off_t(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return -1;
    data += done, bytes -= done, offset += done;
  }
  return 0;
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

// Bytes of `chunk` elements of every input.
int64_t input_room(const SoupSegment& of, int64_t chunk);

// n elements of every input from `first` on into `room`, one after the other; which one failed, and why.
SoupFailure read_inputs(const void** ins, char* room, const SoupSegment& of, int segment, int64_t first, int64_t n,
                        int64_t chunk);

// Elements before the first page's boundary in the outputs, where that can be met: a page that two chunks write is written
// by one after the other.
int64_t before_page(const SoupSegment& of, SoupType out_type);

// n elements of output k, from `first` on.
SoupFailure write_output(void* out, SoupType out_type, const SoupSegment& of, int segment, int k, int64_t first, int64_t n);

// Adds what was seen to `seen`: of a chunk's inputs, whether all their numbers are finite; of an output of it, once it was
// written. `finite` says whether its inputs are, and is asked only where its own numbers are not; `again` gives them as float32, for a
// type that has no infinity to show what was beyond its range.
bool see_inputs(SoupSeen* seen, const SoupSegment& of, int segment, const void* const* ins, int64_t first, int64_t n);
void see_output(SoupSeen* seen, const SoupSegment& of, int segment, int k, const void* out, SoupType out_type, int64_t first,
                int64_t n, const std::function<bool()>& finite, const std::function<void(void*)>& again);

// Tells the system what is read next, and that what was written of a file may go to the disk: the flush at its end then
// waits less.
void read_ahead(const SoupSegment& of);
void write_behind(int file);

// Makes a file so many bytes long, with their place on the disk where the file system can: written pages then need none of
// their own, which is most of what writing to the page cache costs. An errno, or 0.
int allocate(int file, int64_t bytes);

// A cache line's boundary within memory of so many bytes more.
char* line_in(const std::unique_ptr<char[]>& memory);

}  // namespace fastalign
