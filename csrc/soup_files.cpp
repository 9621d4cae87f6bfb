// Chunks of files through the kernel: each thread reads a chunk of every input, then sums and writes one output after
// the other.
//
// Chunks of all inputs and one output must stay in a core's cache between the system's copy and the kernel. Within that
// limit they are as large as possible: the system writes many pages at once more cheaply than one by one.
#include "soup_files.h"

#include <cerrno>
#include <memory>

#include "soup_io.h"

namespace fastalign {

static constexpr int64_t kMemoryChunk = 1 << 16;  // elements

SoupFailure soup_files(SoupSeen* seen, const std::vector<SoupSegment>& segments, SoupType out_type, int64_t chunk, int threads) {
  struct Piece { int segment; int64_t first, n; };
  std::vector<Piece> pieces;
  int64_t room = 0;  // bytes that a thread needs
  for (int s = 0; s < int(segments.size()); ++s) {
    const SoupSegment& of = segments[s];
    const int64_t bytes = input_room(of, chunk) + aligned(chunk * size_of(out_type));
    room = bytes > room ? bytes : room;
    int64_t first = before_page(of, out_type);
    first = first < chunk ? first : 0;
    if (first > 0) pieces.push_back({s, 0, first});
    for (; first < of.n; first += chunk) pieces.push_back({s, first, of.n - first < chunk ? of.n - first : chunk});
  }
  SoupFailure failure;
  bool stop = false;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single nowait
    for (const SoupSegment& of : segments) read_ahead(of);
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
      bool checked = false, all_finite = true;  // a non-finite input makes a non-finite output, so inputs are checked only then
      const auto finite = [&] {
        if (!checked) all_finite = see_inputs(seen, of, piece.segment, ins, piece.first, piece.n), checked = true;
        return all_finite;
      };
      void* const out = mine + input_room(of, chunk);
      for (int k = 0; k < outputs; ++k) {
        const double* weights = of.weights.data() + int64_t(k) * inputs;
        FASTALIGN_CALL(soup_span, &out, out_type, 1, ins, of.in_types.data(), inputs, weights, piece.n);
        const SoupFailure unwritten = write_output(out, out_type, of, piece.segment, k, piece.first, piece.n);
        if (unwritten.failed) {
          fail(unwritten);
          break;
        }
        see_output(seen, of, piece.segment, k, out, out_type, piece.first, piece.n, finite, [&](void* wide) {
          FASTALIGN_CALL(soup_span, &wide, SoupType::float32, 1, ins, of.in_types.data(), inputs, weights, piece.n);
        });
      }
    }
  }
  return failure;
}

SoupFailure soup_dots(std::vector<double>& dots, const SoupSegment& of, bool centered, int64_t chunk, int threads) {
  const int inputs = int(of.in_files.size());
  const int64_t pieces = (of.n + chunk - 1) / chunk, each = int64_t(inputs) * inputs;
  std::vector<double> parts(size_t(pieces * each), 0.0);  // summed in order, so that the result does not depend on threads
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
      FASTALIGN_CALL(soup_dots_span, parts.data() + p * each, ins, of.in_types.data(), inputs, n, centered);
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
