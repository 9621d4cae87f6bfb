// The work between a decoder layer's matrix products: norm, gate and rotation, one pass each. Built once per level.
#include "layer.h"

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kL = lanes<float>;

// f(i, n) over [0, size) in vectors of n = kL, and once for the remainder.
template <typename F> static inline void in_vectors(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kL <= size; i += kL) f(i, kL);
  if (i < size) f(i, size - i);
}

template <typename S> static inline vec<float> load_first(const S* p, int64_t n) {
  if (n == kL) return Storage<S>::load_wide(p);
  vec<float> x = {};
  for (int64_t i = 0; i < n; ++i) x[i] = Storage<S>::widen(p[i]);
  return x;
}

template <typename S> static inline void store_first(S* p, vec<float> x, int64_t n) {
  if (n == kL) return Storage<S>::store_narrow(p, x);
  for (int64_t i = 0; i < n; ++i) p[i] = Storage<S>::narrow(x[i]);
}

template <typename S>
static void norm(S* y, float* rstd, const S* x, const S* weight, int64_t rows, int64_t width, float eps, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const S* in = x + r * width;
    vec<float> sum = {};
    in_vectors(width, [&](int64_t i, int64_t n) {
      const vec<float> a = load_first(in + i, n);
      sum += a * a;
    });
    const float scale = 1.0f / __builtin_sqrtf(reduce_add<float>(sum) / float(width) + eps);
    rstd[r] = scale;
    in_vectors(width, [&](int64_t i, int64_t n) {
      store_first(y + r * width + i, load_first(in + i, n) * scale * (load_first(weight + i, n) + offset), n);
    });
  }
}

void rms_norm(void* y, float* rstd, const void* x, const void* weight, DType dtype, int64_t rows, int64_t width, float eps,
              float offset, int threads) {
  FASTALIGN_SWITCH_FLOAT(dtype, S, norm(static_cast<S*>(y), rstd, static_cast<const S*>(x), static_cast<const S*>(weight), rows,
                                        width, eps, offset, threads))
}

void rms_norm_backward(float* dx, float* dweight, const float* dy, const float* x, const float* rstd,
                       const float* weight, int64_t rows, int64_t width, float offset, int threads) {
  // Chunks are assigned by index, not to whichever thread is free, so that the sums are reproducible.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    float* share = dweight == nullptr ? nullptr : dweight + t * width;
    if (share != nullptr) __builtin_memset(share, 0, size_t(width) * sizeof(float));
    for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; ++r) {
      const float *in = x + r * width, *from = dy + r * width;
      const float scale = rstd[r];
      vec<float> sum = {};
      in_vectors(width, [&](int64_t i, int64_t n) {
        const vec<float> a = load_first(in + i, n), b = load_first(from + i, n);
        sum += a * b * (load_first(weight + i, n) + offset);
        if (share != nullptr) store_first(share + i, load_first(share + i, n) + a * b * scale, n);
      });
      const float along = reduce_add<float>(sum) * scale * scale / float(width);
      in_vectors(width, [&](int64_t i, int64_t n) {
        const vec<float> scaled = load_first(from + i, n) * (load_first(weight + i, n) + offset);
        store_first(dx + r * width + i, (scaled - load_first(in + i, n) * along) * scale, n);
      });
    }
  }
}

static inline vec<float> sigmoid(vec<float> x) {
  const vec<float> e = exp_nonpositive(x < 0 ? x : -x);
  const vec<float> one = splat<float>(1.0f);
  return (x < 0 ? e : one) / (one + e);
}

constexpr int64_t kChunk = 4096;  // elements per thread at a time

template <typename F> static inline void in_chunks(int64_t size, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    const int64_t length = size - begin < kChunk ? size - begin : kChunk;
    in_vectors(length, [&](int64_t i, int64_t n) { f(begin + i, n); });
  }
}

template <typename S> static void gated(S* out, const Rows& gate, const Rows& up, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < gate.count; ++r) {
    const S *gate_row = gate.row<S>(r), *up_row = up.row<S>(r);
    in_vectors(gate.vocab, [&](int64_t i, int64_t n) {
      const vec<float> g = load_first(gate_row + i, n);
      store_first(out + r * gate.vocab + i, g * sigmoid(g) * load_first(up_row + i, n), n);
    });
  }
}

void silu_gate(void* out, const Rows& gate, const Rows& up, int threads) {
  FASTALIGN_SWITCH_FLOAT(gate.dtype, S, gated(static_cast<S*>(out), gate, up, threads))
}

void silu_gate_backward(float* dgate, float* dup, float* dout, const float* gate, const float* up, int64_t n,
                        int threads) {
  in_chunks(n, threads, [&](int64_t i, int64_t m) {
    const vec<float> g = load_first(gate + i, m), u = load_first(up + i, m), d = load_first(dout + i, m);
    const vec<float> s = sigmoid(g), silu = g * s;
    store_first(dgate + i, d * u * (s + silu * (1.0f - s)), m);
    store_first(dup + i, d * silu, m);
    store_first(dout + i, silu * u, m);
  });
}

template <typename S>
static void turned(S* out, const Rows& x, const S* cosine, const S* sine, int64_t tokens, int64_t heads, bool inverse, int threads) {
  const int64_t d = x.vocab, half = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const S *c = cosine + t * d, *s = sine + t * d;
    for (int64_t h = 0; h < heads; ++h) {
      const S* in = x.row<S>(t * heads + h);
      S* to = out + (t * heads + h) * d;
      in_vectors(half, [&](int64_t i, int64_t n) {
        const vec<float> a = load_first(in + i, n), b = load_first(in + half + i, n);
        const vec<float> s1 = load_first(s + i, n), s2 = load_first(s + half + i, n);
        const vec<float> first = a * load_first(c + i, n), second = b * load_first(c + half + i, n);
        store_first(to + i, inverse ? first + b * s2 : first - b * s1, n);
        store_first(to + half + i, inverse ? second - a * s1 : second + a * s2, n);
      });
    }
  }
}

void rotate(void* out, const Rows& x, const void* cosine, const void* sine, int64_t tokens, int64_t heads, bool inverse,
            int threads) {
  FASTALIGN_SWITCH_FLOAT(x.dtype, S, turned(static_cast<S*>(out), x, static_cast<const S*>(cosine), static_cast<const S*>(sine),
                                            tokens, heads, inverse, threads))
}

}  // namespace fastalign::FASTALIGN_LEVEL
