// The only file that knows Python. Tensors arrive as addresses with their sizes and types (fastalign/ops/buffers.py),
// which are checked here against what each kernel reads and writes; the GIL is released around it. No torch header, so
// one build serves every torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gae.h"
#include "isa.h"
#include "layer.h"
#include "linear_logprobs.h"
#include "map_newton.h"
#include "map_statistics.h"
#include "resample.h"
#include "sample_tokens.h"
#include "shared_attention.h"
#include "soup_files.h"
#include "soup_io.h"
#include "soup_task_files.h"
#include "token_logprobs.h"
#include "token_logratios.h"

namespace py = pybind11;
using namespace fastalign;

namespace {

// A failed check is a bug in the caller, never a user's mistake, so it shows its traceback.
[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error("the native extension was called wrongly: " + what);
}

void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
  }
  return "";
}

template <typename T> const char* name_of();
template <> const char* name_of<float>() { return "float32"; }
template <> const char* name_of<int64_t>() { return "int64"; }
template <> const char* name_of<bool>() { return "bool"; }

bool is_called(const py::handle& text, const char* name) { return PyUnicode_CompareWithASCIIString(text.ptr(), name) == 0; }

DType dtype_of(const py::handle& text) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (is_called(text, name_of(dtype))) return dtype;
  }
  refuse("no kernel reads " + std::string(py::str(text)));
}

SoupType soup_type_of(const py::handle& text) {
  constexpr const char* kNames[kSoupTypes] = {"float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"};
  for (int type = 0; type < kSoupTypes; ++type) {
    if (is_called(text, kNames[type])) return SoupType(type);
  }
  refuse("no soup is made of " + std::string(py::str(text)));
}

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The type in which sums over logits of this type are accumulated.
DType compute_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// (address, elements, dtype), as made by `buffer` in fastalign/ops/buffers.py; None: null.
struct Buffer {
  void* data = nullptr;
  int64_t count = 0;
  py::handle dtype;
  Buffer(const py::handle& from) {
    if (from.is_none()) return;
    const auto t = py::reinterpret_borrow<py::tuple>(from);
    data = reinterpret_cast<void*>(t[0].cast<uintptr_t>()), count = t[1].cast<int64_t>();
    dtype = PyTuple_GET_ITEM(t.ptr(), 2);
  }
};

// The address of `count` elements of that type; the buffer must have exactly this size.
void* memory_of(const Buffer& buffer, const char* dtype, int64_t count) {
  if (!buffer.dtype) refuse("a buffer is missing");
  if (!is_called(buffer.dtype, dtype) || buffer.count != count) {
    refuse("a buffer of " + std::to_string(buffer.count) + " " + std::string(py::str(buffer.dtype)) + " where a kernel takes " +
           std::to_string(count) + " " + dtype);
  }
  return buffer.data;
}
void* memory_of(const Buffer& buffer, DType dtype, int64_t count) { return memory_of(buffer, name_of(dtype), count); }
template <typename T> T* memory_of(const Buffer& buffer, int64_t count) {
  return static_cast<T*>(memory_of(buffer, name_of<T>(), count));
}

// Of a buffer whose sums are float32.
DType float_of(const Buffer& buffer) {
  if (!buffer.dtype) refuse("a buffer is missing");
  const DType dtype = dtype_of(buffer.dtype);
  require(dtype != DType::float64, "float64 where a kernel sums in float32");
  return dtype;
}

// Also accepts None, for arguments that a kernel can do without.
void* memory_or_null(const Buffer& buffer, DType dtype, int64_t count) {
  return buffer.dtype ? memory_of(buffer, dtype, count) : nullptr;
}
template <typename T> T* memory_or_null(const Buffer& buffer, int64_t count) {
  return buffer.dtype ? memory_of<T>(buffer, count) : nullptr;
}

// The address of a numpy array's `count` values of type T: contiguous, aligned, native byte order. None: null.
template <typename T> T* data_of(const py::handle& array, int64_t count) {
  if (array.is_none()) return nullptr;
  require(py::isinstance<py::array_t<T, py::array::c_style>>(array), "an array of another type or layout than a kernel takes");
  const auto x = py::reinterpret_borrow<py::array>(array);
  const void* data = x.data();
  require(x.size() == count, "an array of another size than a kernel takes");
  require(reinterpret_cast<uintptr_t>(data) % alignof(T) == 0, "an unaligned array");
  return static_cast<T*>(const_cast<void*>(data));
}

// (address, dtype, count, inner, outer_stride, inner_stride, vocab), as made by `rows` in fastalign/ops/buffers.py
Rows rows_of(const py::tuple& t) {
  return {reinterpret_cast<const void*>(t[0].cast<uintptr_t>()), dtype_of(t[1]), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>(), t[5].cast<int64_t>(), t[6].cast<int64_t>()};
}

// (rewards, center, log_weights, order, offsets, groups), as made in fastalign/ops/map_statistics.py
MapInput map_input_of(const py::tuple& t) {
  const auto rewards = py::reinterpret_borrow<py::array>(t[0]);
  const bool wide = py::isinstance<py::array_t<double>>(rewards);
  require(wide || py::isinstance<py::array_t<float>>(rewards), "rewards that are neither float32 nor float64");
  require(rewards.ndim() == 2, "rewards that are not a matrix");
  const int64_t n = rewards.shape(0), m = rewards.shape(1), size = rewards.itemsize(), groups = t[5].cast<int64_t>();
  const void* data = rewards.data();
  require((m == 1 || rewards.strides(1) == size) && rewards.strides(0) % size == 0 &&
              reinterpret_cast<uintptr_t>(data) % uintptr_t(size) == 0,
          "rewards whose rows are not contiguous and aligned");
  return {data, wide ? DType::float64 : DType::float32, n, m, int64_t(rewards.strides(0)) / size, data_of<double>(t[1], m),
          data_of<double>(t[2], n), data_of<int64_t>(t[3], n), data_of<int64_t>(t[4], groups + 1), groups};
}

// (tile, rows, cols, labels, bias, row, first, temperature, softcap, logit_scale), as fastalign/ops/linear_cpu.py makes
// it: the tile starts at row `row` and at token `first` of the vocabulary.
struct TileOfHead {
  HeadTile tile;
  const void* bias;
  int64_t row, total;  // rows in all
  size_t size;

  explicit TileOfHead(const py::tuple& t) {
    const Buffer data(t[0]), labels(t[3]), biases(t[4]);
    const DType dtype = dtype_of(data.dtype);
    const int64_t rows = t[1].cast<int64_t>(), cols = t[2].cast<int64_t>(), first = t[6].cast<int64_t>();
    row = t[5].cast<int64_t>(), total = labels.count, size = size_of(dtype);
    require(0 <= row && row + rows <= total, "a tile of more rows than there are labels");
    require(!biases.dtype || (0 <= first && first + cols <= biases.count), "a tile beyond the bias");
    const char* all = static_cast<const char*>(memory_or_null(biases, dtype, biases.count));
    bias = all == nullptr ? nullptr : all + size_t(first) * size;
    tile = {memory_of(data, dtype, rows * cols), dtype, rows, cols, memory_of<int64_t>(labels, total) + row, first,
            Transform{t[7].cast<double>(), t[8].cast<double>(), t[9].cast<double>()}};
  }

  // The tile's rows in (of, total) statistics of all rows.
  void* among(const Buffer& all, int64_t of) const {
    return static_cast<char*>(memory_of(all, tile.dtype, of * total)) + size_t(row) * size;
  }
};

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

// Returns the whole pages among these bytes to the operating system; their contents are lost.
void release_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(4095);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

// (n, in_types, in_files, in_offsets, out_files, out_offsets, weights), Segment in fastalign/soup/steps.py
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

SoupSeen seen_by(int inputs, int outputs, bool digesting) {
  SoupSeen seen;
  seen.digesting = digesting;
  seen.digests.assign(size_t(outputs), 0);
  seen.inputs.resize(size_t(inputs)), seen.outputs.resize(size_t(outputs));
  return seen;
}

// (failed, writing, errno or 0 for a file that ended early, segment, file), then the digests as pairs of 64 bits,
// low and high, and the non-finite counts (count, segment, first) of each input and output
py::tuple result_of(const SoupFailure& failed, const SoupSeen& seen) {
  py::list digests, inputs, outputs;
  for (SoupDigest digest : seen.digests) digests.append(py::make_tuple(uint64_t(digest), uint64_t(digest >> 64)));
  for (const auto& one : seen.inputs) inputs.append(py::make_tuple(one.count, one.segment, one.first));
  for (const auto& one : seen.outputs) outputs.append(py::make_tuple(one.count, one.segment, one.first));
  const auto failure = py::make_tuple(failed.failed, failed.writing, failed.error, failed.segment, failed.file);
  return py::make_tuple(failure, digests, inputs, outputs);
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
  m.doc() = "fastalign's native extension; called by fastalign.ops, which checks the arguments";

  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (isa_available(isa)) names.push_back(isa_name(isa));
    }
    return names;
  });

  m.def("first_bad_label", [](const py::object& buffer, int64_t vocab, int64_t ignore_index) {
    const Buffer labels(buffer);
    const int64_t* at = memory_of<int64_t>(labels, labels.count);
    py::gil_scoped_release release;
    return first_bad_label(at, labels.count, vocab, ignore_index);
  });

  m.def("token_logprobs_forward",
        [](const py::object& log_probs, const py::object& max, const py::object& sum, const py::object& entropy,
           const py::object& mean_logits, const py::object& log_sum_sq_probs, const py::object& is_top1,
           const py::tuple& logits, const py::object& labels, int64_t ignore_index, double temperature, double softcap,
           int threads) {
          const Rows rows = rows_of(logits);
          const int64_t n = rows.count;
          const DType wide = compute_of(rows.dtype);
          const LogprobOutputs out = {memory_of(log_probs, wide, n), memory_of(max, wide, n), memory_of(sum, wide, n),
                                      memory_or_null(entropy, wide, n), memory_or_null(mean_logits, wide, n),
                                      memory_or_null(log_sum_sq_probs, wide, n), memory_or_null<bool>(is_top1, n)};
          const int64_t* of = memory_of<int64_t>(labels, n);
          const Transform transform = {temperature, softcap};
          py::gil_scoped_release release;
          FASTALIGN_CALL(token_logprobs_forward, out, rows, of, ignore_index, transform, threads);
        });

  m.def("token_logratios_forward",
        [](const py::object& log_ratios, const py::object& policy_max, const py::object& policy_sum, const py::object& ref_max,
           const py::object& ref_sum, const py::tuple& policy, const py::tuple& ref, const py::object& labels,
           int64_t ignore_index, double temperature, int threads) {
          const Rows policy_rows = rows_of(policy), ref_rows = rows_of(ref);
          const int64_t n = policy_rows.count;
          const DType wide = compute_of(policy_rows.dtype);
          require(ref_rows.count == n && ref_rows.vocab == policy_rows.vocab && ref_rows.dtype == policy_rows.dtype,
                  "the logits of policy and reference differ in shape or type");
          const LogratioOutputs out = {memory_of(log_ratios, wide, n), memory_of(policy_max, wide, n),
                                       memory_of(policy_sum, wide, n), memory_of(ref_max, wide, n), memory_of(ref_sum, wide, n)};
          const int64_t* of = memory_of<int64_t>(labels, n);
          const Transform transform = {temperature, 0.0};
          py::gil_scoped_release release;
          FASTALIGN_CALL(token_logratios_forward, out, policy_rows, ref_rows, of, ignore_index, transform, threads);
        });

  m.def("token_logprobs_backward",
        [](const py::object& grad_logits, const py::object& grad_log_probs, const py::object& grad_entropy,
           const py::object& max, const py::object& sum, const py::object& entropy, const py::tuple& logits,
           const py::object& labels, int64_t ignore_index, double temperature, double softcap, int threads) {
          const Rows rows = rows_of(logits);
          const int64_t n = rows.count;
          const DType wide = compute_of(rows.dtype);
          require(grad_entropy.is_none() == entropy.is_none(), "the entropy's gradient without the entropy");
          void* const grad = memory_of(grad_logits, rows.dtype, n * rows.vocab);
          const LogprobGradients grads = {memory_of(grad_log_probs, wide, n), memory_or_null(grad_entropy, wide, n),
                                          memory_of(max, wide, n), memory_of(sum, wide, n), memory_or_null(entropy, wide, n)};
          const int64_t* of = memory_of<int64_t>(labels, n);
          const Transform transform = {temperature, softcap};
          py::gil_scoped_release release;
          advise_huge_pages(grad, size_t(n) * size_t(rows.vocab) * size_of(rows.dtype));
          FASTALIGN_CALL(token_logprobs_backward, grad, grads, rows, of, ignore_index, transform, threads);
        });

  m.def("release_pages", [](const py::object& buffer, size_t itemsize) {
    const Buffer all(buffer);
    release_pages(all.data, size_t(all.count) * itemsize);
  });

  m.def("head_forward", [](const py::tuple& tile, const py::object& stats, bool all, const py::object& rescale, int threads) {
    const TileOfHead in(tile);
    void* const sums = in.among(stats, 7);
    void* const by = memory_or_null(rescale, in.tile.dtype, in.tile.rows);
    py::gil_scoped_release release;
    FASTALIGN_CALL(head_forward, in.tile, in.bias, sums, in.total, all, by, threads);
  });

  // kept: (threads, cols), or nothing with filter 0
  m.def("head_backward", [](const py::tuple& tile, const py::object& logits, const py::object& rows, double filter,
                            const py::object& kept, int threads) {
    const TileOfHead in(tile);
    const void* from = memory_or_null(logits, in.tile.dtype, in.tile.rows * in.tile.cols);
    void* const grads = in.among(rows, 5);
    bool* const seen = memory_of<bool>(kept, filter != 0 ? threads * in.tile.cols : 0);
    py::gil_scoped_release release;
    FASTALIGN_CALL(head_backward, in.tile, from, in.bias, grads, in.total, filter, seen, threads);
  });

  m.def("map_statistics", [](const py::object& out, const py::tuple& rewards, const py::array& lambda, int threads) {
    const MapInput in = map_input_of(rewards);
    const int64_t count = lambda.shape(0);
    double* const moments = data_of<double>(out, count * (3 + in.m + in.m * in.m));
    const double* const at = data_of<double>(lambda, count * in.m);
    py::gil_scoped_release release;
    FASTALIGN_CALL(map_statistics, moments, in, at, count, threads);
  });

  // result: (first, scale, mu, value, gradient, ess, residual, certificate, certified, passes); request: (palettes,
  // sign, start, constant, skip): numpy arrays as made in fastalign/palette/native.py
  m.def("map_newton", [](const py::tuple& result, const py::tuple& rewards, const py::tuple& request, double tol, double lam_max,
                         int threads) {
    const MapInput in = map_input_of(rewards);
    const int64_t m = in.m, k = int64_t(py::len(result[9]));
    const auto of = [](const py::tuple& t, int i, int64_t count) { return data_of<double>(t[i], count); };
    const MapSolution out = {of(result, 0, 3 + m + m * m), of(result, 1, m), of(result, 2, k * m), of(result, 3, k),
                             of(result, 4, k * m), of(result, 5, k), of(result, 6, k), of(result, 7, k * m),
                             data_of<bool>(result[8], k), data_of<int64_t>(result[9], k)};
    const MapProblem problem = {in, k, of(request, 0, k * m), of(request, 1, m), of(request, 2, k * m), tol, lam_max,
                                data_of<bool>(request[3], m), data_of<bool>(request[4], k)};
    py::gil_scoped_release release;
    return int(FASTALIGN_CALL(map_newton, out, problem, threads));
  });

  m.def("sample_tokens", [](const py::object& ids, const py::object& log_probs, const py::tuple& logits, double temperature,
                            int64_t top_k, double top_p, double min_p, int64_t seed, int64_t offset, const py::object& streams,
                            int64_t streams_width, int threads) {
    const Rows rows = rows_of(logits);
    const SampleOptions options = {temperature, top_k, top_p, min_p, uint64_t(seed), uint64_t(offset),
                                   memory_or_null<int64_t>(streams, rows.count * streams_width), streams_width};
    int64_t* const to = memory_of<int64_t>(ids, rows.count);
    void* const p = memory_of(log_probs, compute_of(rows.dtype), rows.count);
    py::gil_scoped_release release;
    if (!FASTALIGN_CALL(sample_tokens, to, p, rows, options, threads)) throw std::bad_alloc();
  });

  m.def("shared_attention",
        [](const py::object& out, const py::object& keys, const py::object& values, const py::tuple& query,
           const py::tuple& key, const py::tuple& value, const py::list& prompts, const py::object& order,
           const py::object& lengths, int64_t kv, int64_t group, int64_t room, int64_t window, float scaling, float softcap,
           int threads) {
          const Rows q = rows_of(query), k = rows_of(key), v = rows_of(value);
          const int64_t n = Buffer(lengths).count, d = q.vocab, dv = v.vocab, heads = kv * group;
          require(q.dtype != DType::float64, "attention in float64");
          require(k.dtype == q.dtype && v.dtype == q.dtype, "queries, keys and values of several types");
          require(k.vocab == d && q.count == n * heads && k.count == n * kv && v.count == n * kv, "heads of other sizes");
          const int64_t places = kv * room * d > 0 ? Buffer(keys).count / (kv * room * d) : 0;
          require(places >= n, "more rows than places in the cache");
          std::vector<SharedPrompt> shared;
          int64_t first = 0;
          for (const auto& item : prompts) {  // (keys, values, length, rows)
            const auto t = py::reinterpret_borrow<py::tuple>(item);
            const int64_t length = t[2].cast<int64_t>(), count = t[3].cast<int64_t>();
            require(length >= 0 && count >= 0, "a negative length");
            shared.push_back({memory_of(Buffer(t[0]), q.dtype, kv * d * length), memory_of(Buffer(t[1]), q.dtype, kv * length * dv), length,
                              first, count});
            first += count;
          }
          require(first == n, "rows without a prompt");
          const SharedAttention in = {memory_of(out, q.dtype, n * heads * dv), memory_of(keys, q.dtype, places * kv * room * d),
                                      memory_of(values, q.dtype, places * kv * room * dv), q, k, v, shared.data(),
                                      int64_t(shared.size()), memory_of<int64_t>(order, n), memory_of<int64_t>(lengths, n), kv,
                                      group, room, d, dv, window, scaling, softcap};
          for (int64_t i = 0; i < n; ++i) {
            require(0 <= in.order[i] && in.order[i] < n, "a row that is not in flight");
            require(0 <= in.lengths[i] && in.lengths[i] < room, "no room for a new token");
          }
          py::gil_scoped_release release;
          FASTALIGN_CALL(shared_attention, in, threads);
        });

  m.def("rms_norm", [](const py::object& y, const py::object& rstd, const py::object& x, const py::object& weight, int64_t rows,
                       int64_t width, float eps, float offset, int threads) {
    const DType dtype = float_of(Buffer(x));
    void* const to = memory_of(y, dtype, rows * width);
    float* const scales = memory_of<float>(rstd, rows);
    const void *from = memory_of(x, dtype, rows * width), *by = memory_of(weight, dtype, width);
    py::gil_scoped_release release;
    FASTALIGN_CALL(rms_norm, to, scales, from, by, dtype, rows, width, eps, offset, threads);
  });

  m.def("rms_norm_backward", [](const py::object& dx, const py::object& dweight, const py::object& dy, const py::object& x,
                                const py::object& rstd, const py::object& weight, int64_t rows, int64_t width, float offset,
                                int threads) {
    float *const to = memory_of<float>(dx, rows * width), *const shares = memory_or_null<float>(dweight, threads * width);
    const float *grad = memory_of<float>(dy, rows * width), *from = memory_of<float>(x, rows * width);
    const float *scales = memory_of<float>(rstd, rows), *by = memory_of<float>(weight, width);
    py::gil_scoped_release release;
    FASTALIGN_CALL(rms_norm_backward, to, shares, grad, from, scales, by, rows, width, offset, threads);
  });

  m.def("silu_gate", [](const py::object& out, const py::tuple& gate, const py::tuple& up, int threads) {
    const Rows g = rows_of(gate), u = rows_of(up);
    require(g.dtype != DType::float64 && u.dtype == g.dtype && u.count == g.count && u.vocab == g.vocab, "halves of two shapes");
    void* const to = memory_of(out, g.dtype, g.count * g.vocab);
    py::gil_scoped_release release;
    FASTALIGN_CALL(silu_gate, to, g, u, threads);
  });

  m.def("silu_gate_backward", [](const py::object& dgate, const py::object& dup, const py::object& dout, const py::object& gate,
                                 const py::object& up, int64_t n, int threads) {
    float *const dg = memory_of<float>(dgate, n), *const du = memory_of<float>(dup, n), *const d = memory_of<float>(dout, n);
    const float *g = memory_of<float>(gate, n), *u = memory_of<float>(up, n);
    py::gil_scoped_release release;
    FASTALIGN_CALL(silu_gate_backward, dg, du, d, g, u, n, threads);
  });

  m.def("rotate", [](const py::object& out, const py::tuple& x, const py::object& cosine, const py::object& sine, int64_t tokens,
                     int64_t heads, bool inverse, int threads) {
    const Rows from = rows_of(x);
    require(from.vocab % 2 == 0, "heads of an odd size have no halves");
    require(from.dtype != DType::float64 && from.count == tokens * heads, "heads of another number or type");
    void* const to = memory_of(out, from.dtype, tokens * heads * from.vocab);
    const void *c = memory_of(cosine, from.dtype, tokens * from.vocab), *s = memory_of(sine, from.dtype, tokens * from.vocab);
    py::gil_scoped_release release;
    FASTALIGN_CALL(rotate, to, from, c, s, tokens, heads, inverse, threads);
  });

  m.def("gae", [](const py::object& advantages, const py::object& returns, const py::tuple& rewards, const py::tuple& values,
                  const py::object& mask, double gamma, double lambda, int threads) {
    const Rows r = rows_of(rewards), v = rows_of(values);
    require(r.count == v.count && r.vocab == v.vocab && r.dtype == v.dtype, "rewards and values differ in shape or type");
    const int64_t n = r.count * r.vocab;
    void *const to = memory_of(advantages, r.dtype, n), *const sums = memory_of(returns, r.dtype, n);
    const GaeInput in = {r, v, memory_of<bool>(mask, n), gamma, lambda};
    py::gil_scoped_release release;
    FASTALIGN_CALL(gae, to, sums, in, threads);
  });

  m.def("resample", [](const py::object& ids, const py::tuple& log_weights, int64_t k, int method, const py::object& mask,
                       int64_t seed, int threads) {
    const Rows rows = rows_of(log_weights);
    const ResampleOptions options = {k, ResampleMethod(method), memory_or_null<bool>(mask, rows.count * rows.vocab),
                                     uint64_t(seed)};
    int64_t* const to = memory_of<int64_t>(ids, rows.count * k);
    py::gil_scoped_release release;
    if (!FASTALIGN_CALL(resample, to, rows, options, threads)) throw std::bad_alloc();
  });

  m.def("allocate", [](int file, int64_t bytes) {
    py::gil_scoped_release release;
    return allocate(file, bytes);
  });

  m.def("write_behind", [](int file) {
    py::gil_scoped_release release;
    write_behind(file);
  });

  // of segments that have the same files
  m.def("soup_files", [](const py::list& segments, int out_type, int64_t chunk, int threads, bool digesting) {
    std::vector<SoupSegment> all;
    for (const py::handle& segment : segments) all.push_back(segment_of(py::cast<py::tuple>(segment)));
    SoupSeen seen = seen_by(int(all.at(0).in_files.size()), int(all[0].out_files.size()), digesting);
    SoupFailure failure;
    {
      py::gil_scoped_release release;
      failure = soup_files(&seen, all, SoupType(out_type), chunk, threads);
    }
    return result_of(failure, seen);
  });

  // what n bytes at `position` of a file add to its digest; of a whole file of n bytes, after an errno
  m.def("soup_digest", [](const py::buffer& data, int64_t position) {
    const py::buffer_info info = data.request();
    SoupDigest digest;
    {
      py::gil_scoped_release release;
      digest = digest_of(info.ptr, info.size * info.itemsize, position);
    }
    return py::make_tuple(uint64_t(digest), uint64_t(digest >> 64));
  });
  m.def("soup_digest_file", [](int file, int64_t bytes, int threads) {
    SoupDigest digest = 0;
    int error;
    {
      py::gil_scoped_release release;
      error = digest_file(&digest, file, bytes, threads);
    }
    return py::make_tuple(error, py::make_tuple(uint64_t(digest), uint64_t(digest >> 64)));
  });

  // a failure, then the dot products, row by row
  m.def("soup_dots", [](const py::tuple& segment, bool centered, int64_t chunk, int threads) {
    const SoupSegment of = segment_of(segment);
    std::vector<double> dots;
    SoupFailure failure;
    {
      py::gil_scoped_release release;
      failure = soup_dots(dots, of, centered, chunk, threads);
    }
    return py::make_tuple(failure.failed, failure.writing, failure.error, failure.segment, failure.file, dots);
  });

  // choices: (keep, from, to, largest_first, probability, epsilon, own_scale, match_sum, scale, stream) for each model
  m.def("soup_tasks", [](const py::tuple& segment, const py::list& choices, int out_type, double lambda, bool elect,
                         bool normalize, uint64_t seed, int64_t row, int64_t chunk, int threads, bool digesting) {
    const SoupSegment of = segment_of(segment);
    std::vector<TaskChoice> all;
    for (const py::handle& choice : choices) {
      const auto t = py::cast<py::tuple>(choice);
      TaskChoice one;
      one.vector.keep = TaskKeep(t[0].cast<int>());
      one.from = t[1].cast<int64_t>(), one.to = t[2].cast<int64_t>(), one.largest_first = t[3].cast<bool>();
      one.vector.probability = t[4].cast<double>(), one.vector.epsilon = t[5].cast<double>();
      one.vector.own_scale = t[6].cast<bool>(), one.match_sum = t[7].cast<bool>();
      one.vector.scale = t[8].cast<double>(), one.vector.stream = t[9].cast<uint64_t>();
      all.push_back(one);
    }
    SoupSeen seen = seen_by(int(of.in_files.size()), int(of.out_files.size()), digesting);
    SoupFailure failure;
    {
      py::gil_scoped_release release;
      const TaskMerge merge = {nullptr, nullptr, lambda, elect, normalize, seed, row};
      failure = soup_task_files(&seen, of, all, SoupType(out_type), merge, chunk, threads);
    }
    return result_of(failure, seen);
  });

  m.def("soup_memory", [](const py::list& outs, const py::list& ins, const std::vector<double>& weights, int threads) {
    require(!outs.empty() && !ins.empty() && ins.size() <= kSoupInputs, "soups take between 1 and 128 models");
    require(weights.size() == outs.size() * ins.size(), "a weight for each model in each soup");
    const Buffer first(outs[0]);
    std::vector<void*> to;
    std::vector<const void*> from;
    std::vector<SoupType> types;
    for (const py::handle& out : outs) to.push_back(memory_of(out, std::string(py::str(first.dtype)).c_str(), first.count));
    for (const py::handle& in : ins) {
      const Buffer x(in);
      types.push_back(soup_type_of(x.dtype));
      from.push_back(memory_of(x, std::string(py::str(x.dtype)).c_str(), first.count));
    }
    const SoupType out_type = soup_type_of(first.dtype);
    py::gil_scoped_release release;
    soup_memory(to, out_type, from, types, weights, first.count, threads);
  });
}
