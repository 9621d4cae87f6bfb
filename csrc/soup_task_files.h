// Merges of task vectors (soup_tasks.h) of one tensor, from file to file.
#pragma once

#include <cstdint>
#include <vector>

#include "soup_files.h"
#include "soup_tasks.h"

namespace fastalign {

// Which elements of a task vector are kept. band: the ranks [from, to) by magnitude, the smallest 0; among equals the
// earlier ranks lower, or, with largest_first, is kept last. match_sum: rescaled to keep the sum of magnitudes.
struct TaskChoice {
  TaskVector vector;
  int64_t from = 0, to = 0;
  bool largest_first = false, match_sum = false;
};

// The tensor's inputs: the base, then one model per choice; weights (outputs, choices). Reads the inputs once per digit
// of the keys if ranks are needed, once if ties are cut, once for sums of magnitudes, and once to merge.
SoupFailure soup_task_files(SoupSeen* seen, const SoupSegment& tensor, std::vector<TaskChoice> choices, SoupType out_type, TaskMerge merge,
                            int64_t chunk, int threads);

}  // namespace fastalign
