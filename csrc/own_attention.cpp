// The part of a decoding step's attention outside its two large products: softmax over the shared prompt, and attention
// over the candidate's own tokens. Built once per level.
#include "own_attention.h"

#include "simd.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int64_t kL = lanes<float>;
constexpr int64_t kBlock = 256;  // own keys whose scores are in memory at once
constexpr float kNegInf = -__builtin_inff();

// The first n < kL floats, and `rest` in the other lanes.
static inline vec<float> load_some(const float* p, int64_t n, float rest) {
  vec<float> x = splat<float>(rest);
  __builtin_memcpy(&x, p, size_t(n) * sizeof(float));
  return x;
}

// exp(scaling x - max) in place over x[0:n]; gives the max and the sum.
static inline void exp_row(float* x, int64_t n, float scaling, float& top, float& mass) {
  vec<float> m = splat<float>(kNegInf);
  int64_t i = 0;
  for (; i + kL <= n; i += kL) m = max<float>(m, load<float>(x + i) * scaling);
  if (i < n) m = max<float>(m, load_some(x + i, n - i, scaling < 0 ? -kNegInf : kNegInf) * scaling);
  top = reduce_max<float>(m);
  vec<float> sum = {};
  for (i = 0; i + kL <= n; i += kL) {
    const vec<float> p = exp_nonpositive(load<float>(x + i) * scaling - top);
    store<float>(x + i, p);
    sum += p;
  }
  mass = reduce_add<float>(sum);
  if (i < n) {
    const vec<float> p = exp_nonpositive(load_some(x + i, n - i, 0.0f) * scaling - top);
    __builtin_memcpy(x + i, &p, size_t(n - i) * sizeof(float));
    for (int64_t k = 0; k < n - i; ++k) mass += p[k];
  }
}

void exp_rows(float* scores, float* max, float* mass, int64_t rows, int64_t length, float scaling, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) exp_row(scores + r * length, length, scaling, max[r], mass[r]);
}

static inline float dot(const float* a, const float* b, int64_t d) {
  vec<float> sum = {};
  int64_t j = 0;
  for (; j + kL <= d; j += kL) sum += load<float>(a + j) * load<float>(b + j);
  float total = reduce_add<float>(sum);
  for (; j < d; ++j) total += a[j] * b[j];
  return total;
}

static inline void add_scaled(float* to, const float* x, float by, int64_t d) {
  int64_t j = 0;
  for (; j + kL <= d; j += kL) store<float>(to + j, load<float>(to + j) + by * load<float>(x + j));
  for (; j < d; ++j) to[j] += by * x[j];
}

static inline void scale(float* x, float by, int64_t d) {
  int64_t j = 0;
  for (; j + kL <= d; j += kL) store<float>(x + j, load<float>(x + j) * by);
  for (; j < d; ++j) x[j] *= by;
}

// One query: continues from the prompt's part (its sum is in `out`) over the candidate's own keys, block by block.
static void attend(float* out, float top, float mass, const float* query, const float* keys, const float* values,
                   int64_t length, float scaling, int64_t d, int64_t dv) {
  float scores[kBlock];
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t n = length - begin < kBlock ? length - begin : kBlock;
    for (int64_t t = 0; t < n; ++t) scores[t] = dot(query, keys + (begin + t) * d, d);
    float block_top, block_mass;
    exp_row(scores, n, scaling, block_top, block_mass);
    const float higher = block_top > top ? block_top : top;
    const float before = exp(top - higher), now = exp(block_top - higher);
    if (before != 1.0f) scale(out, before, dv);
    for (int64_t t = 0; t < n; ++t) add_scaled(out, values + (begin + t) * dv, now * scores[t], dv);
    mass = before * mass + now * block_mass;
    top = higher;
  }
  scale(out, 1.0f / mass, dv);
}

void own_attention(float* out, const OwnAttention& in, int threads) {
  const int64_t d = in.d, dv = in.dv;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int64_t i = 0; i < in.n; ++i) {
    for (int64_t h = 0; h < in.kv; ++h) {
      const int64_t place = in.rows[i], length = in.lengths[place] + 1, head = place * in.kv + h;
      float *keys = in.keys + head * in.room * d, *values = in.values + head * in.room * dv;
      __builtin_memcpy(keys + (length - 1) * d, in.key + head * d, size_t(d) * sizeof(float));
      __builtin_memcpy(values + (length - 1) * dv, in.value + head * dv, size_t(dv) * sizeof(float));
      for (int64_t g = 0; g < in.group; ++g) {
        const int64_t of = (h * in.n + i) * in.group + g, query = head * in.group + g;
        float* const to = out + query * dv;
        __builtin_memcpy(to, in.prompt_sum + of * dv, size_t(dv) * sizeof(float));
        attend(to, in.prompt_max[of], in.prompt_mass[of], in.query + query * d, keys, values, length, in.scaling, d, dv);
      }
    }
  }
}

}  // namespace fastalign::FASTALIGN_LEVEL
