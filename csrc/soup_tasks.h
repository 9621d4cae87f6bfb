// Merges task vectors (a model minus its base) of which only some elements are kept: TIES, DARE, DELLA, breadcrumbs.
// The definition is fastalign/soup/by_torch.py. Input 0 is the base. Each function takes n elements, from element
// `first` of the tensor on, and needs scratch of soup_task_scratch bytes. One thread.
#pragma once

#include <cstdint>

#include "isa.h"
#include "soup.h"

namespace fastalign {

// all: every element is kept. band: by key, the magnitude's bits read as an integer. random: at random.
// ranked: at random, the more likely the larger the element is within its row.
enum class TaskKeep : int { all, band, random, ranked };

struct TaskVector {
  TaskKeep keep = TaskKeep::all;
  uint64_t low = 0, high = ~uint64_t(0);  // band: keys from low to high stay; of those equal to low, elements
  int64_t low_first = 0, low_last = INT64_MAX, high_last = INT64_MAX;  // [low_first, low_last); to high, [0, high_last)
  double probability = 1, epsilon = 0;  // of being kept; ranked: probability - epsilon to probability + epsilon
  uint64_t stream = 0;                 // of random numbers
  bool own_scale = false;              // ranked: kept elements are divided by their own probability
  double scale = 1;
};

// Counts of a digit of the keys, for elements whose keys' higher digits are `prefix`.
struct TaskDigit { int vector, shift; uint64_t prefix; };
constexpr int kDigitBits = 11;
constexpr int kBins = (1 << kDigitBits) + 1;  // the last is for other prefixes
constexpr int kTurns = 4;                     // used in turn, because neighbouring elements often fall into the same bin

struct TaskTie { int vector; uint64_t key; };

struct TaskMerge {
  const TaskVector* vectors;  // (inputs - 1,)
  const double* weights;      // (outputs, inputs - 1)
  double lambda;
  bool elect, normalize;      // TIES' election of signs; division by the sum of the weights used
  uint64_t seed;
  int64_t row;                // elements; ranked: what is given is whole rows
};

}  // namespace fastalign

FASTALIGN_DECLARE(
  int64_t soup_task_scratch(const SoupType* in_types, int inputs, int64_t ranked_row);
  // counts (count, kTurns, kBins): how often each digit occurs is the sum over kTurns; n < 2^32
  void soup_task_histogram(uint32_t* counts, const TaskDigit* digits, int count, const void* const* ins,
                           const SoupType* in_types, int inputs, int64_t n, void* scratch);
  // counts[i] += the number of elements that have the key
  void soup_task_ties(int64_t* counts, const TaskTie* ties, int count, const void* const* ins, const SoupType* in_types,
                      int inputs, int64_t n, void* scratch);
  // The position of the nth such element, counted from 0, or n.
  int64_t soup_task_nth(TaskTie tie, int64_t nth, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                        void* scratch);
  // sums (inputs - 1, 2) += magnitudes of all elements, and of the kept ones
  void soup_task_sizes(double* sums, const TaskMerge& merge, const void* const* ins, const SoupType* in_types, int inputs,
                       int64_t first, int64_t n, void* scratch);
  void soup_task_span(void* const* outs, SoupType out_type, int outputs, const TaskMerge& merge, const void* const* ins,
                      const SoupType* in_types, int inputs, int64_t first, int64_t n, void* scratch);
)
