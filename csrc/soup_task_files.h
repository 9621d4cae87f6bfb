// Merges of task vectors (soup_tasks.h) of one tensor, from file to file.
#pragma once

#include <cstdint>
#include <vector>

#include "soup_files.h"
#include "soup_tasks.h"

namespace fastalign {

// What stays of one task vector. band: the ranks [from, to) by size, the least 0; among equals the earlier is the less,
// or, where largest_first, the last of those that stay. match_sum: scaled so that the sum of sizes is as it was.
struct TaskChoice {
  TaskVector vector;
  int64_t from = 0, to = 0;
  bool largest_first = false, match_sum = false;
};

// The tensor's inputs: the base, then a model for each choice; weights (outputs, choices). Reads the inputs once for every
// digit of the keys where ranks are asked for, once where ties are cut, once for sums of sizes, and once to merge.
SoupFailure soup_task_files(SoupSeen* seen, const SoupSegment& tensor, std::vector<TaskChoice> choices, SoupType out_type, TaskMerge merge,
                            int64_t chunk, int threads);

}  // namespace fastalign
