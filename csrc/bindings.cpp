// The only file that knows Python. Tensors arrive as raw pointers, sizes and strides, already checked by
// fastalign/ops; the GIL is released around every kernel. No torch header, so one build serves every torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gae.h"
#include "isa.h"
#include "layer.h"
#include "linear_logprobs.h"
#include "map_newton.h"
#include "map_small.h"
#include "map_statistics.h"
#include "own_attention.h"
#include "resample.h"
#include "sample_tokens.h"
#include "soup_files.h"
#include "soup_io.h"
#include "soup_task_files.h"
#include "token_logprobs.h"
#include "token_logratios.h"

namespace py = pybind11;
using namespace fastalign;

namespace {

template <typename T = void> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Where a numpy array's values lie: a tenth of the time that asking it in Python takes. None: null.
template <typename T> T* data_of(const py::handle& array) {
  return array.is_none() ? nullptr : static_cast<T*>(const_cast<void*>(py::reinterpret_borrow<py::array>(array).data()));
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + name);
}

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// (data, dtype, count, inner, outer_stride, inner_stride, vocab), as fastalign/ops/_rows.py makes it
Rows rows_of(const py::tuple& t) {
  return {ptr(t[0].cast<uintptr_t>()), dtype_of(t[1].cast<std::string>()), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>(), t[5].cast<int64_t>(), t[6].cast<int64_t>()};
}

// (rewards, center, log_weights, order, offsets, groups), as fastalign/ops/map_statistics.py makes it
MapInput map_input_of(const py::tuple& t) {
  const auto rewards = py::reinterpret_borrow<py::array>(t[0]);
  const DType dtype = rewards.itemsize() == 4 ? DType::float32 : DType::float64;
  return {rewards.data(), dtype, int64_t(rewards.shape(0)), int64_t(rewards.shape(1)), int64_t(rewards.strides(0) / rewards.itemsize()),
          data_of<double>(t[1]), data_of<double>(t[2]), data_of<int64_t>(t[3]), data_of<int64_t>(t[4]), t[5].cast<int64_t>()};
}

HeadTile head_tile_of(const py::tuple& t) {
  return {ptr(t[0].cast<uintptr_t>()), dtype_of(t[1].cast<std::string>()), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          ptr<const int64_t>(t[4].cast<uintptr_t>()), t[5].cast<int64_t>(),
          Transform{t[6].cast<double>(), t[7].cast<double>(), t[8].cast<double>()}};
}

// A fresh output of many megabytes costs more in page faults than in arithmetic; huge pages make them few.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (bytes >= 2 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Gives the whole pages among these bytes back to the system; what they held is lost.
void release_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

// (n, in_types, in_files, in_offsets, out_files, out_offsets, weights), as fastalign/soup/stream.py makes it
SoupSegment segment_of(const py::tuple& t) {
  SoupSegment of;
  of.n = t[0].cast<int64_t>();
  for (int type : t[1].cast<std::vector<int>>()) of.in_types.push_back(SoupType(type));
  of.in_files = t[2].cast<std::vector<int>>();
  of.in_offsets = t[3].cast<std::vector<int64_t>>();
  of.out_files = t[4].cast<std::vector<int>>();
  of.out_offsets = t[5].cast<std::vector<int64_t>>();
  of.weights = t[6].cast<std::vector<double>>();
  return of;
}

// The first position whose label is neither ignored nor within [0, vocab), or -1.
int64_t first_bad_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index) {
  for (int64_t i = 0; i < count; ++i) {
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= vocab)) return i;
  }
  return -1;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastalign's CPU engine; called by fastalign.ops, which checks the arguments";

  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (isa_available(isa)) names.push_back(isa_name(isa));
    }
    return names;
  });

  m.def("first_bad_label", [](uintptr_t labels, int64_t count, int64_t vocab, int64_t ignore_index) {
    py::gil_scoped_release release;
    return first_bad_label(ptr<const int64_t>(labels), count, vocab, ignore_index);
  });

  m.def("token_logprobs_forward",
        [](uintptr_t log_probs, uintptr_t max, uintptr_t sum, uintptr_t entropy, uintptr_t mean_logits,
           uintptr_t log_sum_sq_probs, uintptr_t is_top1, const py::tuple& logits, uintptr_t labels,
           int64_t ignore_index, double temperature, double softcap, int threads) {
          const Rows rows = rows_of(logits);
          const LogprobOutputs out = {ptr(log_probs), ptr(max), ptr(sum), ptr(entropy), ptr(mean_logits),
                                      ptr(log_sum_sq_probs), ptr<bool>(is_top1)};
          const Transform transform = {temperature, softcap};
          py::gil_scoped_release release;
          FASTALIGN_CALL(token_logprobs_forward, out, rows, ptr<const int64_t>(labels), ignore_index, transform, threads);
        });

  m.def("token_logratios_forward",
        [](uintptr_t log_ratios, uintptr_t policy_max, uintptr_t policy_sum, uintptr_t ref_max, uintptr_t ref_sum,
           const py::tuple& policy, const py::tuple& ref, uintptr_t labels, int64_t ignore_index, double temperature,
           int threads) {
          const Rows policy_rows = rows_of(policy), ref_rows = rows_of(ref);
          const LogratioOutputs out = {ptr(log_ratios), ptr(policy_max), ptr(policy_sum), ptr(ref_max), ptr(ref_sum)};
          const Transform transform = {temperature, 0.0};
          py::gil_scoped_release release;
          FASTALIGN_CALL(token_logratios_forward, out, policy_rows, ref_rows, ptr<const int64_t>(labels), ignore_index,
                         transform, threads);
        });

  m.def("token_logprobs_backward",
        [](uintptr_t grad_logits, uintptr_t grad_log_probs, uintptr_t grad_entropy, uintptr_t max, uintptr_t sum,
           uintptr_t entropy, const py::tuple& logits, uintptr_t labels, int64_t ignore_index, double temperature,
           double softcap, int threads) {
          const Rows rows = rows_of(logits);
          const LogprobGradients grads = {ptr(grad_log_probs), ptr(grad_entropy), ptr(max), ptr(sum), ptr(entropy)};
          const Transform transform = {temperature, softcap};
          py::gil_scoped_release release;
          advise_huge_pages(ptr(grad_logits), size_t(rows.count) * size_t(rows.vocab) * size_of(rows.dtype));
          FASTALIGN_CALL(token_logprobs_backward, ptr(grad_logits), grads, rows, ptr<const int64_t>(labels),
                         ignore_index, transform, threads);
        });

  m.def("release_pages", [](uintptr_t data, size_t bytes) { release_pages(ptr(data), bytes); });

  // tile: (data, dtype, rows, cols, labels, first, temperature, softcap, logit_scale), as
  // fastalign/ops/linear_token_logprobs.py makes it
  m.def("head_forward", [](const py::tuple& tile, uintptr_t bias, uintptr_t stats, int64_t stats_stride, bool all,
                           uintptr_t rescale, int threads) {
    const HeadTile in = head_tile_of(tile);
    py::gil_scoped_release release;
    FASTALIGN_CALL(head_forward, in, ptr(bias), ptr(stats), stats_stride, all, ptr(rescale), threads);
  });

  m.def("head_backward", [](const py::tuple& tile, uintptr_t logits, uintptr_t bias, uintptr_t rows, int64_t rows_stride,
                            double filter, uintptr_t kept, int threads) {
    const HeadTile in = head_tile_of(tile);
    py::gil_scoped_release release;
    FASTALIGN_CALL(head_backward, in, ptr(logits), ptr(bias), ptr(rows), rows_stride, filter, ptr<bool>(kept), threads);
  });

  m.def("map_statistics", [](const py::object& out, const py::tuple& rewards, const py::array& lambda, int threads) {
    const MapInput in = map_input_of(rewards);
    double* const moments = data_of<double>(out);
    const double* const at = data_of<double>(lambda);
    const int64_t count = lambda.shape(0);
    py::gil_scoped_release release;
    FASTALIGN_CALL(map_statistics, moments, in, at, count, threads);
  });

  m.def("is_positive_definite", [](const py::array_t<double, py::array::c_style | py::array::forcecast>& a, double ridge) {
    return FASTALIGN_CALL(is_positive_definite, a.data(), int64_t(a.shape(0)), ridge);
  });

  // out: lambda, levels (m), KL, effective sample size, residual, gap. Returns how often the rows were read; 0: not for here.
  m.def("map_small", [](const py::array& out, const py::array& rewards, const py::array& palette, const py::array& sign,
                        double log_norm, double tol, double flat) {
    const MapInput in = map_input_of(py::make_tuple(rewards, py::none(), py::none(), py::none(), py::none(), 0));
    double *const to = data_of<double>(out), *const scalars = to + 2 * in.m;
    if (in.m > kMostValues || out.size() != 2 * in.m + 4 || palette.size() != in.m || sign.size() != in.m) {
      throw std::invalid_argument("map_small takes at most 64 values, and a palette and signs of as many");
    }
    int64_t passes = 0;
    const MapAnswer answer = {to, to + in.m, scalars, scalars + 1, scalars + 2, scalars + 3, &passes};
    const double *const asked = data_of<double>(palette), *const signs = data_of<double>(sign);
    py::gil_scoped_release release;
    return FASTALIGN_CALL(map_small, answer, in, asked, signs, log_norm, tol, flat) ? passes : int64_t(0);
  });

  // points: (mu, value, gradient, hessian, top, ess); problem: (scale, offset, lower, upper, start, constant, skip): numpy
  // arrays as fastalign/palette/_engine.py makes them
  m.def("map_newton", [](const py::tuple& points, const py::object& passes, const py::object& certificate,
                         const py::object& certified, const py::tuple& rewards, const py::tuple& problem, double log_norm,
                         double tol, bool keep, int threads) {
    const auto of = [](const py::tuple& t, int i) { return data_of<double>(t[i]); };
    const MapPoints where = {of(points, 0), of(points, 1), of(points, 2), of(points, 3), of(points, 4), of(points, 5)};
    const MapProblem what = {map_input_of(rewards), int64_t(py::len(passes)), log_norm, tol, of(problem, 0), of(problem, 1),
                             of(problem, 2), of(problem, 3), of(problem, 4), data_of<bool>(problem[5]),
                             data_of<bool>(problem[6])};
    if (what.rewards.m > kMostValues || what.rewards.offsets != nullptr || (!keep && what.count != 1)) {
      throw std::invalid_argument("map_newton takes one group and at most 64 values, and many palettes only with keep");
    }
    int64_t* const counted = data_of<int64_t>(passes);
    double* const directions = data_of<double>(certificate);
    bool* const found = data_of<bool>(certified);
    py::gil_scoped_release release;
    FASTALIGN_CALL(map_newton, where, counted, directions, found, what, keep, threads);
  });

  m.def("sample_tokens", [](uintptr_t ids, uintptr_t log_probs, const py::tuple& logits, double temperature, int64_t top_k,
                            double top_p, double min_p, int64_t seed, int64_t offset, uintptr_t streams, int64_t streams_width,
                            int threads) {
    const Rows rows = rows_of(logits);
    const SampleOptions options = {temperature, top_k, top_p, min_p, uint64_t(seed), uint64_t(offset),
                                   ptr<const int64_t>(streams), streams_width};
    py::gil_scoped_release release;
    if (!FASTALIGN_CALL(sample_tokens, ptr<int64_t>(ids), ptr(log_probs), rows, options, threads)) throw std::bad_alloc();
  });

  m.def("exp_rows", [](uintptr_t scores, uintptr_t max, uintptr_t mass, int64_t rows, int64_t length, float scaling,
                       int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(exp_rows, ptr<float>(scores), ptr<float>(max), ptr<float>(mass), rows, length, scaling, threads);
  });

  m.def("own_attention",
        [](uintptr_t out, uintptr_t keys, uintptr_t values, uintptr_t query, uintptr_t key, uintptr_t value,
           uintptr_t prompt_sum, uintptr_t prompt_max, uintptr_t prompt_mass, uintptr_t rows, uintptr_t lengths, int64_t n,
           int64_t kv, int64_t group, int64_t room, int64_t d, float scaling, int threads) {
          const OwnAttention in = {ptr<float>(keys), ptr<float>(values), ptr<float>(query), ptr<float>(key), ptr<float>(value),
                                   ptr<float>(prompt_sum), ptr<float>(prompt_max), ptr<float>(prompt_mass),
                                   ptr<int64_t>(rows), ptr<int64_t>(lengths), n, kv, group, room, d, scaling};
          py::gil_scoped_release release;
          FASTALIGN_CALL(own_attention, ptr<float>(out), in, threads);
        });

  m.def("rms_norm", [](uintptr_t y, uintptr_t rstd, uintptr_t x, uintptr_t weight, int64_t rows, int64_t width, float eps,
                       float offset, int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(rms_norm, ptr<float>(y), ptr<float>(rstd), ptr<const float>(x), ptr<const float>(weight), rows, width, eps,
                   offset, threads);
  });

  m.def("rms_norm_backward", [](uintptr_t dx, uintptr_t dweight, uintptr_t dy, uintptr_t x, uintptr_t rstd,
                                uintptr_t weight, int64_t rows, int64_t width, float offset, int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(rms_norm_backward, ptr<float>(dx), ptr<float>(dweight), ptr<const float>(dy), ptr<const float>(x),
                   ptr<const float>(rstd), ptr<const float>(weight), rows, width, offset, threads);
  });

  m.def("silu_gate", [](uintptr_t out, uintptr_t gate, uintptr_t up, int64_t n, int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(silu_gate, ptr<float>(out), ptr<const float>(gate), ptr<const float>(up), n, threads);
  });

  m.def("silu_gate_backward", [](uintptr_t dgate, uintptr_t dup, uintptr_t dout, uintptr_t gate, uintptr_t up, int64_t n,
                                 int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(silu_gate_backward, ptr<float>(dgate), ptr<float>(dup), ptr<float>(dout), ptr<const float>(gate),
                   ptr<const float>(up), n, threads);
  });

  m.def("rotate", [](uintptr_t out, uintptr_t x, uintptr_t cosine, uintptr_t sine, int64_t tokens, int64_t heads, int64_t d,
                     bool inverse, int threads) {
    py::gil_scoped_release release;
    FASTALIGN_CALL(rotate, ptr<float>(out), ptr<const float>(x), ptr<const float>(cosine), ptr<const float>(sine), tokens,
                   heads, d, inverse, threads);
  });

  m.def("gae", [](uintptr_t advantages, uintptr_t returns, const py::tuple& rewards, const py::tuple& values, uintptr_t mask,
                  double gamma, double lambda, int threads) {
    const GaeInput in = {rows_of(rewards), rows_of(values), ptr<const bool>(mask), gamma, lambda};
    py::gil_scoped_release release;
    FASTALIGN_CALL(gae, ptr(advantages), ptr(returns), in, threads);
  });

  m.def("resample", [](uintptr_t ids, const py::tuple& log_weights, int64_t k, int method, uintptr_t mask, int64_t seed,
                       int threads) {
    const Rows rows = rows_of(log_weights);
    const ResampleOptions options = {k, ResampleMethod(method), ptr<const bool>(mask), uint64_t(seed)};
    py::gil_scoped_release release;
    if (!FASTALIGN_CALL(resample, ptr<int64_t>(ids), rows, options, threads)) throw std::bad_alloc();
  });

  m.def("allocate", [](int file, int64_t bytes) {
    py::gil_scoped_release release;
    return allocate(file, bytes);
  });

  m.def("write_behind", [](int file) {
    py::gil_scoped_release release;
    write_behind(file);
  });

  // (failed, writing, errno or 0 for a file that ended early, segment, file)
  m.def("soup_files", [](const py::list& segments, int out_type, int64_t chunk, int threads) {
    std::vector<SoupSegment> all;
    for (const py::handle& segment : segments) all.push_back(segment_of(py::cast<py::tuple>(segment)));
    SoupFailure found;
    {
      py::gil_scoped_release release;
      found = soup_files(all, SoupType(out_type), chunk, threads);
    }
    return py::make_tuple(found.failed, found.writing, found.error, found.segment, found.file);
  });

  // the same, then the dot products, row by row
  m.def("soup_dots", [](const py::tuple& segment, bool centered, int64_t chunk, int threads) {
    const SoupSegment of = segment_of(segment);
    std::vector<double> dots;
    SoupFailure found;
    {
      py::gil_scoped_release release;
      found = soup_dots(dots, of, centered, chunk, threads);
    }
    return py::make_tuple(found.failed, found.writing, found.error, found.segment, found.file, dots);
  });

  // choices: (keep, from, to, largest_first, probability, spread, own_scale, match_sum, scale, stream) for each model
  m.def("soup_tasks", [](const py::tuple& segment, const py::list& choices, int out_type, double lambda, bool elect,
                         bool normalize, uint64_t seed, int64_t row, int64_t chunk, int threads) {
    const SoupSegment of = segment_of(segment);
    std::vector<TaskChoice> all;
    for (const py::handle& choice : choices) {
      const auto t = py::cast<py::tuple>(choice);
      TaskChoice one;
      one.vector.keep = TaskKeep(t[0].cast<int>());
      one.from = t[1].cast<int64_t>(), one.to = t[2].cast<int64_t>(), one.largest_first = t[3].cast<bool>();
      one.vector.probability = t[4].cast<double>(), one.vector.spread = t[5].cast<double>();
      one.vector.own_scale = t[6].cast<bool>(), one.match_sum = t[7].cast<bool>();
      one.vector.scale = t[8].cast<double>(), one.vector.stream = t[9].cast<uint64_t>();
      all.push_back(one);
    }
    SoupFailure found;
    {
      py::gil_scoped_release release;
      const TaskMerge merge = {nullptr, nullptr, lambda, elect, normalize, seed, row};
      found = soup_task_files(of, all, SoupType(out_type), merge, chunk, threads);
    }
    return py::make_tuple(found.failed, found.writing, found.error, found.segment, found.file);
  });

  m.def("soup_memory", [](const std::vector<uintptr_t>& outs, int out_type, const std::vector<uintptr_t>& ins,
                          const std::vector<int>& in_types, const std::vector<double>& weights, int64_t n, int threads) {
    std::vector<void*> to;
    std::vector<const void*> from;
    std::vector<SoupType> types;
    for (uintptr_t out : outs) to.push_back(ptr(out));
    for (uintptr_t in : ins) from.push_back(ptr<const void>(in));
    for (int type : in_types) types.push_back(SoupType(type));
    py::gil_scoped_release release;
    soup_memory(to, SoupType(out_type), from, types, weights, n, threads);
  });
}
