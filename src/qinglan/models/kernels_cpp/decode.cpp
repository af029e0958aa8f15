// Attention of one new token in each row: its key and value are stored, its queries read the row's own columns alone.
// All is fp32 or all bf16, sums and the softmax fp32.
//
// Letters: B rows, S slots, C columns of a slot, H heads, G heads of keys, D units of a head.

#include <omp.h>

#include "numbers.h"

extern "C" struct Decoding {
  long rows, heads, groups, units, capacity;
  long query_row, key_row, value_row;  // steps between rows
  float scale, epsilon;
};

namespace {

// Reads one head of one token: y = x w / sqrt(mean(x^2) + epsilon) where there is a norm, then rotated, times `scale`.
template <class T>
void read_head(const Decoding& of, const T* x, const float* weight, const float* cos, const float* sin, float scale,
               float* y) {
  float squares = 0;
  for (long d = 0; d < of.units; d++) {
    y[d] = number(x[d]);
    squares += y[d] * y[d];
  }
  if (weight) {
    const float norm = 1 / std::sqrt(squares / of.units + of.epsilon);
    for (long d = 0; d < of.units; d++) y[d] *= norm * weight[d];
  }
  rotate(y, of.units, cos, sin, 1);
  for (long d = 0; d < of.units; d++) y[d] *= scale;
}

// One row's new token for one key head: its key and value are stored, its queries attend to the row's columns.
template <class T>
void decode_row(const Decoding& of, long b, long g, long position, const T* query, const T* key, const T* value,
                const float* query_norm, const float* key_norm, const float* cos, const float* sin, T* keys,
                T* values, T* output, float* space) {
  const long units = of.units, shared = of.heads / of.groups, slot = (b * of.groups + g) * of.capacity * units;
  const long whole = units / LANES * LANES;
  float *q = space, *mixed = space + units, *scores = space + 2 * units;
  T *k = keys + slot, *v = values + slot;
  read_head(of, key + b * of.key_row + g * units, key_norm, cos + b * units, sin + b * units, 1, q);
  for (long d = 0; d < units; d++) put(k + position * units + d, q[d]);
  std::memcpy(v + position * units, value + b * of.value_row + g * units, units * sizeof(T));
  const long count = position + 1, filled_count = filled(count, LANES);
  for (long h = g * shared; h < (g + 1) * shared; h++) {
    read_head(of, query + b * of.query_row + h * units, query_norm, cos + b * units, sin + b * units, of.scale, q);
    for (long first_column = 0; first_column < count; first_column += LANES) {
      Vector products[LANES];
      for (long lane = 0; lane < LANES; lane++) {
        const T* column = k + std::min(first_column + lane, count - 1) * units;
        for (long d = 0; d < units; d += 64 / sizeof(T)) {  // the next head's, which are on their way from memory meanwhile
          __builtin_prefetch(column + of.capacity * units + d, 0, 2);
          __builtin_prefetch(column + (v - k) + of.capacity * units + d, 0, 2);
        }
        products[lane] = Vector{};
        for (long d = 0; d < whole; d += LANES) products[lane] += load(q + d) * load(column + d);
        for (long d = whole; d < units; d++) products[lane][0] += q[d] * number(column[d]);
      }
      store(scores + first_column, sums_of(products));
    }
    for (long c = count; c < filled_count; c++) scores[c] = LOWEST;
    const float sum = soften(scores, filled_count);
    for (long d = 0; d < whole; d += LANES) {
      Vector sums[4] = {};  // as many as a processor adds at a time
      for (long c = 0; c < filled_count; c += 4)
        for (long part = 0; part < 4; part++)
          sums[part] += scores[c + part] * load(v + std::min(c + part, count - 1) * units + d);
      store(mixed + d, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (long d = whole; d < units; d++) {
      mixed[d] = 0;
      for (long c = 0; c < count; c++) mixed[d] += scores[c] * number(v[c * units + d]);
    }
    for (long d = 0; d < units; d++) put(output + (b * of.heads + h) * units + d, mixed[d] / sum);
  }
}

template <class T>
void decode_all(const Decoding& of, const int64_t* positions, const T* query, const T* key, const T* value,
                const float* query_norm, const float* key_norm, const float* cos, const float* sin, T* keys, T* values,
                T* output) {
#pragma omp parallel
  {
    Space space(2 * of.units + of.capacity + 2 * LANES);
    float* own = space.take(2 * of.units + of.capacity + LANES);
#pragma omp for schedule(static)
    for (long n = 0; n < of.rows * of.groups; n++)
      decode_row(of, n / of.groups, n % of.groups, positions[n / of.groups], query, key, value, query_norm, key_norm,
                 cos, sin, keys, values, output, own);
  }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                             \
  extern "C" void decode_##NAME(const Decoding* of, const int64_t* positions, const T* query, const T* key,           \
                                const T* value, const float* query_norm, const float* key_norm, const float* cos,     \
                                const float* sin, T* keys, T* values, T* output) {                                    \
    decode_all(*of, positions, query, key, value, query_norm, key_norm, cos, sin, keys, values, output);              \
  }
FUNCTIONS(float, float32)
FUNCTIONS(BFloat16, bfloat16)

// As PyTorch's, if both have one OpenMP.
extern "C" int num_threads() { return omp_get_max_threads(); }
