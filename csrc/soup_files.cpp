// Chunks of files through the kernel: each thread reads a chunk of every input, sums, and writes every output.
//
// pread and pwrite, not mmap: a disk's error or a file cut short is an errno here, and would be a signal there.
// Chunks are small enough to stay in a core's cache between the system's copy and the kernel.
#include "soup_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

namespace fastalign {

static constexpr int64_t kMemoryChunk = 1 << 16;  // elements

// 0 when all of it was read or written, else an errno, or -1 where the file ended.
template <typename Call> static int whole(Call call, char* data, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t done = call(data, size_t(bytes), off_t(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return -1;
    data += done, bytes -= done, offset += done;
  }
  return 0;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

static int64_t input_room(const SoupSegment& of, int64_t chunk) {
  int64_t bytes = 0;
  for (SoupType type : of.in_types) bytes += aligned(chunk * size_of(type));
  return bytes;
}

// n elements of every input from `first` on into `room`, one after the other; which one failed, and why.
static SoupFailure read_inputs(const void** ins, char* room, const SoupSegment& of, int segment, int64_t first, int64_t n,
                               int64_t chunk) {
  for (int i = 0; i < int(of.in_files.size()); ++i) {
    const int64_t size = size_of(of.in_types[i]);
    const int error = whole([&](char* to, size_t bytes, off_t at) { return pread(of.in_files[i], to, bytes, at); }, room,
                            n * size, of.in_offsets[i] + first * size);
    if (error != 0) return {true, false, error < 0 ? 0 : error, segment, i};
    ins[i] = room;
    room += aligned(chunk * size);
  }
  return {};
}

static void read_ahead(const SoupSegment& of) {
#if defined(POSIX_FADV_WILLNEED)
  for (size_t i = 0; i < of.in_files.size(); ++i) {
    posix_fadvise(of.in_files[i], of.in_offsets[i], of.n * size_of(of.in_types[i]), POSIX_FADV_WILLNEED);
  }
#else
  (void)of;
#endif
}

// A cache line's boundary within memory of so many bytes more.
static char* line_in(const std::unique_ptr<char[]>& memory) {
  return reinterpret_cast<char*>(aligned(int64_t(reinterpret_cast<uintptr_t>(memory.get()))));
}

SoupFailure soup_files(const std::vector<SoupSegment>& segments, SoupType out_type, int64_t chunk, int threads) {
  struct Piece { int segment; int64_t first, n; };
  std::vector<Piece> pieces;
  int64_t room = 0;  // bytes that a thread needs
  for (int s = 0; s < int(segments.size()); ++s) {
    const SoupSegment& of = segments[s];
    const int64_t bytes = input_room(of, chunk) + int64_t(of.out_files.size()) * aligned(chunk * size_of(out_type));
    room = bytes > room ? bytes : room;
    for (int64_t first = 0; first < of.n; first += chunk) {
      pieces.push_back({s, first, of.n - first < chunk ? of.n - first : chunk});
    }
    read_ahead(of);
  }
  SoupFailure failure;
  bool stop = false;
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<char[]> buffer(new (std::nothrow) char[size_t(room) + 64]);
    const auto fail = [&](const SoupFailure& with) {
#pragma omp critical(soup_failure)
      if (!failure.failed) failure = with;
#pragma omp atomic write
      stop = true;
    };
    if (buffer == nullptr) fail({true, true, ENOMEM, 0, 0});
    char* const mine = line_in(buffer);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < int64_t(pieces.size()); ++p) {
      bool stopped;
#pragma omp atomic read
      stopped = stop;
      if (stopped) continue;
      const Piece piece = pieces[size_t(p)];
      const SoupSegment& of = segments[size_t(piece.segment)];
      const int inputs = int(of.in_files.size()), outputs = int(of.out_files.size());
      const void* ins[kSoupInputs];
      const SoupFailure unread = read_inputs(ins, mine, of, piece.segment, piece.first, piece.n, chunk);
      if (unread.failed) {
        fail(unread);
        continue;
      }
      const int64_t bytes = piece.n * size_of(out_type), stride = aligned(chunk * size_of(out_type));
      char* const next = mine + input_room(of, chunk);
      int error = 0;
      std::vector<void*> outs(static_cast<size_t>(outputs));
      for (int k = 0; k < outputs; ++k) outs[size_t(k)] = next + k * stride;
      FASTALIGN_CALL(soup_span, outs.data(), out_type, outputs, ins, of.in_types.data(), inputs, of.weights.data(), piece.n);
      for (int k = 0; k < outputs && error == 0; ++k) {
        error = whole([&](char* from, size_t count, off_t at) { return pwrite(of.out_files[k], from, count, at); },
                      static_cast<char*>(outs[size_t(k)]), bytes, of.out_offsets[k] + piece.first * size_of(out_type));
        if (error != 0) fail({true, true, error < 0 ? EIO : error, piece.segment, k});
      }
    }
  }
#if defined(__linux__)
  // The disk may begin with these bytes while the next call computes; the flush at the file's end then waits less.
  for (const SoupSegment& of : segments) {
    for (size_t k = 0; k < of.out_files.size(); ++k) {
      sync_file_range(of.out_files[k], of.out_offsets[k], of.n * size_of(out_type), SYNC_FILE_RANGE_WRITE);
    }
  }
#endif
  return failure;
}

SoupFailure soup_dots(std::vector<double>& dots, const SoupSegment& of, int64_t chunk, int threads) {
  const int inputs = int(of.in_files.size());
  const int64_t pieces = (of.n + chunk - 1) / chunk, each = int64_t(inputs) * inputs;
  std::vector<double> parts(size_t(pieces * each), 0.0);  // summed in order, so that threads do not show
  read_ahead(of);
  SoupFailure failure;
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<char[]> buffer(new (std::nothrow) char[size_t(input_room(of, chunk)) + 64]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = p * chunk, n = of.n - first < chunk ? of.n - first : chunk;
      const void* ins[kSoupInputs];
      SoupFailure unread = {true, false, ENOMEM, 0, 0};
      if (buffer != nullptr) unread = read_inputs(ins, line_in(buffer), of, 0, first, n, chunk);
      if (unread.failed) {
#pragma omp critical(soup_failure)
        if (!failure.failed) failure = unread;
        continue;
      }
      FASTALIGN_CALL(soup_dots_span, parts.data() + p * each, ins, of.in_types.data(), inputs, n);
    }
  }
  dots.assign(size_t(each), 0.0);
  for (size_t i = 0; i < parts.size(); ++i) dots[i % size_t(each)] += parts[i];
  return failure;
}

void soup_memory(const std::vector<void*>& outs, SoupType out_type, const std::vector<const void*>& ins,
                 const std::vector<SoupType>& in_types, const std::vector<double>& weights, int64_t n, int threads) {
  const int64_t pieces = (n + kMemoryChunk - 1) / kMemoryChunk;
  threads = pieces < threads ? int(pieces < 1 ? 1 : pieces) : threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t first = p * kMemoryChunk, count = n - first < kMemoryChunk ? n - first : kMemoryChunk;
    const void* from[kSoupInputs];
    std::vector<void*> to(outs);
    for (size_t i = 0; i < ins.size(); ++i) from[i] = static_cast<const char*>(ins[i]) + first * size_of(in_types[i]);
    for (void*& out : to) out = static_cast<char*>(out) + first * size_of(out_type);
    FASTALIGN_CALL(soup_span, to.data(), out_type, int(to.size()), from, in_types.data(), int(ins.size()), weights.data(), count);
  }
}

}  // namespace fastalign
