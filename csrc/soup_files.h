// Weighted sums of tensors in files or in memory, by chunks and in parallel.
#pragma once

#include <cstdint>
#include <vector>

#include "soup.h"
#include "soup_digest.h"

namespace fastalign {

// n elements that are contiguous in every input and in every output. An input or output is a file and an offset.
struct SoupSegment {
  int64_t n;
  std::vector<SoupType> in_types;
  std::vector<int> in_files, out_files;             // file descriptors
  std::vector<int64_t> in_offsets, out_offsets;     // bytes
  std::vector<double> weights;                      // (outputs, inputs)
};

// Which file failed, and why: an errno, or 0 for a file that ended early; the file counts within its segment.
struct SoupFailure {
  bool failed = false, writing = false;
  int error = 0, segment = 0, file = 0;
};

// Statistics of the numbers read and written.
struct SoupSeen {
  // The number of non-finite elements, and the first of them, counted within its segment.
  struct Count {
    int64_t count = 0, first = 0;
    int segment = 0;
  };
  bool digesting = false;
  std::vector<SoupDigest> digests;  // of the written data, by output
  std::vector<Count> inputs;        // by input
  std::vector<Count> outputs;       // by output; only if no input has any in the same chunk
};

// Reads every segment's inputs once, in chunks of at most `chunk` elements a thread, and writes every output once.
// Holds threads * chunk elements of every input and of one output.
SoupFailure soup_files(SoupSeen* seen, const std::vector<SoupSegment>& segments, SoupType out_type, int64_t chunk, int threads);

// Dot products of a segment's inputs with each other, or, centered, of the others' differences from input 0:
// dots (inputs, inputs). Outputs and weights are ignored.
SoupFailure soup_dots(std::vector<double>& dots, const SoupSegment& segment, bool centered, int64_t chunk, int threads);

// soup_files in memory: outs (outputs,), ins (inputs,) addresses of n contiguous elements each.
void soup_memory(const std::vector<void*>& outs, SoupType out_type, const std::vector<const void*>& ins,
                 const std::vector<SoupType>& in_types, const std::vector<double>& weights, int64_t n, int threads);

}  // namespace fastalign
