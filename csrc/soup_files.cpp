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

SoupFailure soup_files(const std::vector<SoupSegment>& segments, SoupType out_type, int64_t chunk, int threads) {
  struct Piece { int segment; int64_t first, n; };
  std::vector<Piece> pieces;
  int64_t room = 0;  // bytes that a thread needs
  for (int s = 0; s < int(segments.size()); ++s) {
    const SoupSegment& of = segments[s];
    int64_t bytes = int64_t(of.out_files.size()) * ((chunk * size_of(out_type) + 63) & ~int64_t(63));
    for (SoupType type : of.in_types) bytes += (chunk * size_of(type) + 63) & ~int64_t(63);
    room = bytes > room ? bytes : room;
    for (int64_t first = 0; first < of.n; first += chunk) {
      pieces.push_back({s, first, of.n - first < chunk ? of.n - first : chunk});
    }
#if defined(POSIX_FADV_WILLNEED)
    for (size_t i = 0; i < of.in_files.size(); ++i) {
      posix_fadvise(of.in_files[i], of.in_offsets[i], of.n * size_of(of.in_types[i]), POSIX_FADV_WILLNEED);
    }
#endif
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
    char* const aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) & ~uintptr_t(63));
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
      char* next = aligned;
      int error = 0;
      for (int i = 0; i < inputs && error == 0; ++i) {
        const int64_t size = size_of(of.in_types[i]);
        error = whole([&](char* to, size_t bytes, off_t at) { return pread(of.in_files[i], to, bytes, at); }, next,
                      piece.n * size, of.in_offsets[i] + piece.first * size);
        if (error != 0) fail({true, false, error < 0 ? 0 : error, piece.segment, i});
        ins[i] = next;
        next += (chunk * size + 63) & ~int64_t(63);
      }
      if (error != 0) continue;
      const int64_t bytes = piece.n * size_of(out_type), stride = (chunk * size_of(out_type) + 63) & ~int64_t(63);
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
