// Passes over one tensor's chunks, each in parallel: digits of the keys until the keys of the ranks are known, the
// positions at which their ties are cut, sums of magnitudes, and the merge. Only counts are kept between passes.
#include "soup_task_files.h"

#include <algorithm>
#include <cerrno>
#include <memory>

#include "soup_io.h"

namespace fastalign {

static constexpr int64_t kScan = 1 << 16;  // elements per read in passes that write nothing

namespace {

// One tensor's chunks through use(piece, ins, first, n, scratch, outs) -> SoupFailure, in parallel.
struct Chunks {
  const SoupSegment& of;
  int threads;
  int64_t ranked_row;  // 0 if no rank within a row is needed

  // A multiple of the row, if rows must stay whole.
  int64_t step(int64_t chunk) const { return ranked_row == 0 ? chunk : std::max<int64_t>(1, chunk / ranked_row) * ranked_row; }
  int64_t count(int64_t chunk) const { return (of.n + step(chunk) - 1) / step(chunk); }

  template <typename Use> SoupFailure each(int64_t chunk, SoupType out_type, int outputs, Use use) const {
    const int64_t size = std::min(step(chunk), of.n), pieces = count(chunk), stride = aligned(size * size_of(out_type));
    const int inputs = int(of.in_files.size());
    const int64_t scratch = FASTALIGN_CALL(soup_task_scratch, of.in_types.data(), inputs, ranked_row);
    const int64_t room = input_room(of, size) + outputs * stride + scratch;
    SoupFailure failure;
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, pieces)))
    {
      const std::unique_ptr<char[]> buffer(new (std::nothrow) char[size_t(room) + 64]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t first = p * size, n = std::min(size, of.n - first);
        const void* ins[kSoupInputs];
        SoupFailure result = {true, true, ENOMEM, 0, 0};
        if (buffer != nullptr) {
          char* const mine = line_in(buffer);
          result = read_inputs(ins, mine, of, 0, first, n, size);
          char* const outs = mine + input_room(of, size);
          if (!result.failed) result = use(p, ins, first, n, outs + outputs * stride, outs, stride);
        }
        if (!result.failed) continue;
#pragma omp critical(soup_failure)
        if (!failure.failed) failure = result;
      }
    }
    return failure;
  }

  // use(ins, first, n, scratch) for one of scan's chunks.
  template <typename Use> SoupFailure one(int64_t p, Use use) const {
    const int64_t size = std::min(step(kScan), of.n), first = p * size, n = std::min(size, of.n - first);
    const int64_t scratch = FASTALIGN_CALL(soup_task_scratch, of.in_types.data(), int(of.in_files.size()), ranked_row);
    const std::unique_ptr<char[]> buffer(new (std::nothrow) char[size_t(input_room(of, size) + scratch) + 64]);
    if (buffer == nullptr) return {true, true, ENOMEM, 0, 0};
    const void* ins[kSoupInputs];
    const SoupFailure failure = read_inputs(ins, line_in(buffer), of, 0, first, n, size);
    if (!failure.failed) use(ins, first, n, line_in(buffer) + input_room(of, size));
    return failure;
  }

  template <typename Use> SoupFailure scan(Use use) const {
    return each(kScan, SoupType::float32, 0, [&](int64_t p, const void* const* ins, int64_t first, int64_t n, char* scratch,
                                                 char*, int64_t) {
      use(p, ins, first, n, scratch);
      return SoupFailure();
    });
  }
};

// The key at a rank of one task vector, determined digit by digit.
struct Selection {
  int choice;
  bool low;       // else the band's high end
  int64_t left;   // the rank minus the number of elements known to lie below
  uint64_t prefix = 0;
  int64_t ties = 0, cut = 0;  // elements with this key; how many of them, from the first on, lie on one side
  int64_t place = 0;          // of the first on the other side
};

SoupFailure find_keys(std::vector<Selection>& wanted, const Chunks& chunks) {
  const SoupSegment& of = chunks.of;
  const int inputs = int(of.in_files.size()), count = int(wanted.size());
  const bool wide = std::any_of(of.in_types.begin(), of.in_types.end(), [](SoupType t) { return t == SoupType::float64; });
  for (int digit = (wide ? 63 : 31) / kDigitBits; digit >= 0; --digit) {
    std::vector<TaskDigit> digits;
    for (const Selection& one : wanted) digits.push_back({one.choice, digit * kDigitBits, one.prefix});
    const int64_t bins = int64_t(1) << kDigitBits;
    std::vector<int64_t> all(size_t(count * bins), 0);
    const SoupFailure failure = chunks.scan([&](int64_t, const void* const* ins, int64_t, int64_t n, char* scratch) {
      std::vector<uint32_t> mine(size_t(count * kTurns * kBins), 0);
      FASTALIGN_CALL(soup_task_histogram, mine.data(), digits.data(), count, ins, of.in_types.data(), inputs, n, scratch);
#pragma omp critical(soup_histograms)
      for (int64_t i = 0; i < int64_t(all.size()); ++i) {
        const uint32_t* const turns = mine.data() + i / bins * kTurns * kBins + i % bins;
        for (int turn = 0; turn < kTurns; ++turn) all[size_t(i)] += turns[turn * kBins];
      }
    });
    if (failure.failed) return failure;
    for (int c = 0; c < count; ++c) {
      Selection& one = wanted[size_t(c)];
      int64_t bin = 0;
      const int64_t* const counts = all.data() + c * bins;
      while (bin < bins - 1 && one.left >= counts[bin]) one.left -= counts[bin++];
      one.prefix = one.prefix << kDigitBits | uint64_t(bin);
      one.ties = counts[bin];
    }
  }
  return {};
}

// The element at which each selection's ties are cut.
SoupFailure cut_ties(std::vector<Selection>& wanted, const Chunks& chunks) {
  const SoupSegment& of = chunks.of;
  const int inputs = int(of.in_files.size());
  std::vector<TaskTie> ties;
  std::vector<Selection*> cut;
  for (Selection& one : wanted) {
    one.place = one.cut == 0 ? 0 : of.n;
    if (one.cut == 0 || one.cut == one.ties) continue;
    ties.push_back({one.choice, one.prefix});
    cut.push_back(&one);
  }
  if (cut.empty()) return {};
  const int count = int(cut.size());
  std::vector<int64_t> ties_in(size_t(chunks.count(kScan) * count), 0);
  const SoupFailure failure = chunks.scan([&](int64_t p, const void* const* ins, int64_t, int64_t n, char* scratch) {
    FASTALIGN_CALL(soup_task_ties, ties_in.data() + p * count, ties.data(), count, ins, of.in_types.data(), inputs, n, scratch);
  });
  if (failure.failed) return failure;
  std::vector<int64_t> in_piece, before;  // where each is cut
  for (int c = 0; c < count; ++c) {
    int64_t p = 0, sum = 0;
    while (sum + ties_in[size_t(p * count + c)] <= cut[size_t(c)]->cut) sum += ties_in[size_t(p++ * count + c)];
    in_piece.push_back(p), before.push_back(sum);
  }
  for (int c = 0; c < count; ++c) {
    const SoupFailure unread = chunks.one(in_piece[size_t(c)], [&](const void* const* ins, int64_t first, int64_t n, char* scratch) {
      cut[size_t(c)]->place = first + FASTALIGN_CALL(soup_task_nth, ties[size_t(c)], cut[size_t(c)]->cut - before[size_t(c)],
                                                     ins, of.in_types.data(), inputs, n, scratch);
    });
    if (unread.failed) return unread;
  }
  return {};
}

// The keys and places that bound every band.
SoupFailure find_bands(std::vector<TaskChoice>& choices, const Chunks& chunks) {
  std::vector<Selection> wanted;
  for (int i = 0; i < int(choices.size()); ++i) {
    const TaskChoice& one = choices[size_t(i)];
    if (one.vector.keep != TaskKeep::band || one.from >= one.to) continue;
    if (one.from > 0) wanted.push_back({i, true, one.from});
    if (one.to < chunks.of.n) wanted.push_back({i, false, one.to - 1});
  }
  if (!wanted.empty()) {
    SoupFailure failure = find_keys(wanted, chunks);
    if (failure.failed) return failure;
    for (Selection& one : wanted) {
      const bool first_stay = one.low && choices[size_t(one.choice)].largest_first;
      // one.left ties lie below the rank: at the low end they are dropped; at the high end they and the one at the rank
      // stay.
      one.cut = first_stay ? one.ties - one.left : one.low ? one.left : one.left + 1;
    }
    failure = cut_ties(wanted, chunks);
    if (failure.failed) return failure;
  }
  for (const Selection& one : wanted) {
    TaskVector& of = choices[size_t(one.choice)].vector;
    if (!one.low) of.high = one.prefix, of.high_last = one.place;
    else if (choices[size_t(one.choice)].largest_first) of.low = one.prefix, of.low_last = one.place;
    else of.low = one.prefix, of.low_first = one.place;
  }
  for (TaskChoice& one : choices) {
    if (one.vector.keep == TaskKeep::band && one.from >= one.to) one.vector.scale = 0, one.vector.keep = TaskKeep::all;
  }
  return {};
}

SoupFailure match_sums(std::vector<TaskChoice>& choices, const TaskMerge& merge, const Chunks& chunks) {
  const SoupSegment& of = chunks.of;
  const int inputs = int(of.in_files.size());
  const size_t each = 2 * choices.size();
  std::vector<double> parts(size_t(chunks.count(kScan)) * each, 0.0);  // summed in order, so that the result does not depend on threads
  const SoupFailure failure = chunks.scan([&](int64_t p, const void* const* ins, int64_t first, int64_t n, char* scratch) {
    FASTALIGN_CALL(soup_task_sizes, parts.data() + size_t(p) * each, merge, ins, of.in_types.data(), inputs, first, n, scratch);
  });
  if (failure.failed) return failure;
  for (size_t i = 0; i < choices.size(); ++i) {
    double before = 0, after = 0;
    for (size_t p = 0; p < parts.size(); p += each) before += parts[p + 2 * i], after += parts[p + 2 * i + 1];
    if (choices[i].match_sum && before >= 1e-7 && after >= 1e-7) choices[i].vector.scale *= before / after;
  }
  return {};
}

}  // namespace

SoupFailure soup_task_files(SoupSeen* seen, const SoupSegment& of, std::vector<TaskChoice> choices, SoupType out_type, TaskMerge merge,
                            int64_t chunk, int threads) {
  const int inputs = int(of.in_files.size()), outputs = int(of.out_files.size());
  const auto ranked = [](const TaskChoice& one) { return one.vector.keep == TaskKeep::ranked; };
  const Chunks chunks = {of, threads, std::any_of(choices.begin(), choices.end(), ranked) ? merge.row : 0};
  read_ahead(of);
  SoupFailure failure = find_bands(choices, chunks);
  if (failure.failed) return failure;
  std::vector<TaskVector> vectors;
  const auto collect = [&] {
    vectors.clear();
    for (const TaskChoice& one : choices) vectors.push_back(one.vector);
    merge.vectors = vectors.data();
  };
  collect();
  if (std::any_of(choices.begin(), choices.end(), [](const TaskChoice& one) { return one.match_sum; })) {
    failure = match_sums(choices, merge, chunks);
    if (failure.failed) return failure;
    collect();
  }
  merge.weights = of.weights.data();
  failure = chunks.each(chunk, out_type, outputs, [&](int64_t, const void* const* ins, int64_t first, int64_t n,
                                                      char* scratch, char* room, int64_t stride) {
    std::vector<void*> outs(static_cast<size_t>(outputs));
    for (int k = 0; k < outputs; ++k) outs[size_t(k)] = room + k * stride;
    FASTALIGN_CALL(soup_task_span, outs.data(), out_type, outputs, merge, ins, of.in_types.data(), inputs, first, n, scratch);
    const bool finite = see_inputs(seen, of, 0, ins, first, n);
    for (int k = 0; k < outputs; ++k) {
      const SoupFailure unwritten = write_output(outs[size_t(k)], out_type, of, 0, k, first, n);
      if (unwritten.failed) return unwritten;
      see_output(seen, of, 0, k, outs[size_t(k)], out_type, first, n, [&] { return finite; }, [&](void* wide) {
        TaskMerge one = merge;
        one.weights += k * int64_t(choices.size());
        FASTALIGN_CALL(soup_task_span, &wide, SoupType::float32, 1, one, ins, of.in_types.data(), inputs, first, n, scratch);
      });
    }
    return SoupFailure();
  });
  return failure;
}

}  // namespace fastalign
