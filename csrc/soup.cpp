// soup_span: blocks of every input are widened into the cache, summed in registers, and narrowed once; or, for a few
// outputs of the inputs' own type, read directly. Built once per level.
#include "soup.h"

#include "soup_wide.h"

namespace fastalign::FASTALIGN_LEVEL {

constexpr int kDirect = 2;  // with more outputs, widening the inputs once is worth a buffer

// The sum of one step's elements of one output, left in `sums`.
template <typename C> static inline void sum_step(C* sums, const C* const* wide, int inputs, const C* weights, int64_t j) {
  constexpr int V = int(kStep / lanes<C>);
  vec<C> total[V];
  for (int v = 0; v < V; ++v) total[v] = weights[0] * load<C>(wide[0] + j + v * lanes<C>);
  for (int i = 1; i < inputs; ++i) {
    const C weight = weights[i];
    const C* x = wide[i] + j;
    for (int v = 0; v < V; ++v) total[v] += weight * load<C>(x + v * lanes<C>);
  }
  for (int v = 0; v < V; ++v) store<C>(sums + v * lanes<C>, total[v]);
}

template <typename S> struct TypeOf;
template <> struct TypeOf<double> { static constexpr SoupType type = SoupType::float64; };
template <> struct TypeOf<float> { static constexpr SoupType type = SoupType::float32; };
template <> struct TypeOf<bfloat16> { static constexpr SoupType type = SoupType::bfloat16; };
template <> struct TypeOf<float16> { static constexpr SoupType type = SoupType::float16; };
template <> struct TypeOf<float8_e4m3fn> { static constexpr SoupType type = SoupType::float8_e4m3fn; };
template <> struct TypeOf<float8_e5m2> { static constexpr SoupType type = SoupType::float8_e5m2; };

// One output, inputs of the same type, whole steps, without the buffer: the same sums in the same order. Interleaved
// pairs are safe here: a NaN that comes from bfloat16 numbers and finite weights has clear low bits.
template <typename S>
static void direct(S* out, const S* const* ins, int inputs, const typename Storage<S>::C* weights, int64_t n) {
  typedef typename Storage<S>::C C;
  constexpr int64_t L = lanes<C>;
  constexpr int V = 4;
  for (int64_t j = 0; j < n; j += V * L) {
    vec<C> total[V], x[V];
    for (int v = 0; v < V; v += 2) Storage<S>::load_pair(ins[0] + j + v * L, x[v], x[v + 1]);
    for (int v = 0; v < V; ++v) total[v] = weights[0] * x[v];
    for (int i = 1; i < inputs; ++i) {
      for (int v = 0; v < V; v += 2) Storage<S>::load_pair(ins[i] + j + v * L, x[v], x[v + 1]);
      for (int v = 0; v < V; ++v) total[v] += weights[i] * x[v];
    }
    for (int v = 0; v < V; v += 2) Storage<S>::store_pair(out + j + v * L, total[v], total[v + 1]);
  }
}

template <typename S, typename C>
static void span(void* const* outs, int outputs, const void* const* ins, const SoupType* in_types, int inputs,
                 const double* weights, int64_t n) {
  alignas(64) C buffer[kBuffer], sums[kStep], row[kSoupInputs];
  const int64_t most = kBuffer / inputs / kStep * kStep;  // at least one step of 128 inputs: kStep is 64 or less
  const C* wide[kSoupInputs];
  int64_t done = 0;
  if constexpr (sizeof(C) == sizeof(typename Storage<S>::C)) {
    bool alike = outputs <= kDirect;
    for (int i = 0; i < inputs; ++i) alike &= in_types[i] == TypeOf<S>::type;
    if (alike) {
      done = n / kStep * kStep;
      const S* from[kSoupInputs];
      for (int i = 0; i < inputs; ++i) from[i] = static_cast<const S*>(ins[i]);
      for (int k = 0; k < outputs; ++k) {
        for (int i = 0; i < inputs; ++i) row[i] = C(weights[int64_t(k) * inputs + i]);
        direct<S>(static_cast<S*>(outs[k]), from, inputs, row, done);
      }
    }
  }
  for (int64_t first = done; first < n; first += most) {
    const int64_t count = n - first < most ? n - first : most;
    widen_blocks<C>(buffer, most, wide, ins, in_types, inputs, first, count);
    for (int k = 0; k < outputs; ++k) {
      S* out = static_cast<S*>(outs[k]) + first;
      for (int i = 0; i < inputs; ++i) row[i] = C(weights[int64_t(k) * inputs + i]);
      for (int64_t j = 0; j < count; j += kStep) {
        sum_step<C>(sums, wide, inputs, row, j);
        narrow_vectors<S, C>(out + j, sums, count - j < kStep ? count - j : kStep);
      }
    }
  }
}

template <typename C>
static void dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n,
                      bool centered) {
  alignas(64) C buffer[kBuffer];
  const int64_t most = kBuffer / inputs / kStep * kStep;
  const C* wide[kSoupInputs];
  constexpr int V = int(kStep / lanes<C>);
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = n - first < most ? n - first : most;
    widen_blocks<C>(buffer, most, wide, ins, in_types, inputs, first, count);
    for (int i = 1; centered && i < inputs; ++i) {
      for (int64_t j = 0; j < count; ++j) buffer[i * most + j] -= buffer[j];
    }
    for (int a = 0; a < inputs; ++a) {
      for (int b = a; b < inputs; ++b) {
        vec<C> total[V] = {};
        for (int64_t j = 0; j < count; j += kStep) {
          for (int v = 0; v < V; ++v) total[v] += load<C>(wide[a] + j + v * lanes<C>) * load<C>(wide[b] + j + v * lanes<C>);
        }
        double sum = 0;
        for (int v = 0; v < V; ++v) {
          for (int l = 0; l < lanes<C>; ++l) sum += double(total[v][l]);
        }
        dots[a * inputs + b] += sum;
        if (a != b) dots[b * inputs + a] += sum;
      }
    }
  }
}

// B: the element's bits, those of the exponent (and, for a type without infinities, of its NaN) in `mask`.
template <typename B> static int64_t not_finite(const B* x, B mask, int64_t n, int64_t* first) {
  constexpr int64_t kBlock = 4096;
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    B any = 0;
    for (int64_t j = begin; j < end; ++j) any |= B(-B((x[j] & mask) == mask));
    if (any == 0) continue;
    for (int64_t j = begin; j < end; ++j) {
      if ((x[j] & mask) != mask) continue;
      if (count++ == 0) *first = j;
    }
  }
  return count;
}

int64_t soup_not_finite(const void* x, SoupType type, int64_t n, int64_t* first) {
  switch (type) {
    case SoupType::float64: return not_finite(static_cast<const uint64_t*>(x), uint64_t(0x7FF) << 52, n, first);
    case SoupType::float32: return not_finite(static_cast<const uint32_t*>(x), uint32_t(0x7F800000), n, first);
    case SoupType::bfloat16: return not_finite(static_cast<const uint16_t*>(x), uint16_t(0x7F80), n, first);
    case SoupType::float16: return not_finite(static_cast<const uint16_t*>(x), uint16_t(0x7C00), n, first);
    case SoupType::float8_e4m3fn: return not_finite(static_cast<const uint8_t*>(x), uint8_t(0x7F), n, first);
    case SoupType::float8_e5m2: return not_finite(static_cast<const uint8_t*>(x), uint8_t(0x7C), n, first);
  }
  return 0;
}

void soup_dots_span(double* dots, const void* const* ins, const SoupType* in_types, int inputs, int64_t n, bool centered) {
  any_wide(in_types, inputs) ? dots_span<double>(dots, ins, in_types, inputs, n, centered)
                             : dots_span<float>(dots, ins, in_types, inputs, n, centered);
}

void soup_span(void* const* outs, SoupType out_type, int outputs, const void* const* ins, const SoupType* in_types,
               int inputs, const double* weights, int64_t n) {
  const bool wide = any_wide(in_types, inputs);  // a float64 output alone has a case of its own
#define FASTALIGN_SPAN(S)                                                                          \
  wide ? span<S, double>(outs, outputs, ins, in_types, inputs, weights, n)                         \
       : span<S, float>(outs, outputs, ins, in_types, inputs, weights, n);                         \
  break
  switch (out_type) {
    case SoupType::float64: span<double, double>(outs, outputs, ins, in_types, inputs, weights, n); break;
    case SoupType::float32: FASTALIGN_SPAN(float);
    case SoupType::bfloat16: FASTALIGN_SPAN(bfloat16);
    case SoupType::float16: FASTALIGN_SPAN(float16);
    case SoupType::float8_e4m3fn: FASTALIGN_SPAN(float8_e4m3fn);
    case SoupType::float8_e5m2: FASTALIGN_SPAN(float8_e5m2);
  }
#undef FASTALIGN_SPAN
}

}  // namespace fastalign::FASTALIGN_LEVEL
