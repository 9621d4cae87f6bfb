// Reading and writing chunks of files, shared by all code that reads whole checkpoints.
//
// pread and pwrite rather than mmap: a disk error or a truncated file gives an errno here, and would be a signal there.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>

#include "soup_files.h"

namespace fastalign {

// 0 if all of it was read or written, else an errno, or -1 if the file ended early.
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

// Reads n elements of every input from `first` on into `room`, one after the other; reports which one failed, and why.
SoupFailure read_inputs(const void** ins, char* room, const SoupSegment& of, int segment, int64_t first, int64_t n,
                        int64_t chunk);

// The number of elements before the first page boundary of the outputs, if a boundary can be reached: two chunks that
// share a page would have to write it one after the other.
int64_t before_page(const SoupSegment& of, SoupType out_type);

// Writes n elements of output k, from `first` on.
SoupFailure write_output(void* out, SoupType out_type, const SoupSegment& of, int segment, int k, int64_t first, int64_t n);

// Adds a chunk's inputs, and an output once it is written, to `seen`. see_inputs returns whether all inputs are finite.
// `finite` returns the same, and is called only if the output has non-finite numbers; `again` recomputes the output as
// float32, for a type without infinity, to find numbers beyond its range.
bool see_inputs(SoupSeen* seen, const SoupSegment& of, int segment, const void* const* ins, int64_t first, int64_t n);
void see_output(SoupSeen* seen, const SoupSegment& of, int segment, int k, const void* out, SoupType out_type, int64_t first,
                int64_t n, const std::function<bool()>& finite, const std::function<void(void*)>& again);

// Tells the system what is read next, and to start writing a file's data to disk, so that the final flush takes less
// time.
void read_ahead(const SoupSegment& of);
void write_behind(int file);

// Sets a file's length and, if the file system can, allocates its blocks; pages written later then need no allocation,
// which is most of the cost of writing to the page cache. Returns an errno, or 0.
int allocate(int file, int64_t bytes);

// The first cache-line boundary in this memory.
char* line_in(const std::unique_ptr<char[]>& memory);

}  // namespace fastalign
