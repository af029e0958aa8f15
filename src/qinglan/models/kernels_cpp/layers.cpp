// What stands between a decoder's products: sums with their norm, and the gate of the MLP. Each is one pass over memory.
//
// Letters: N rows, D units of a row. Inputs and results are fp32 or bf16, which flags say; sums are fp32.

#include "numbers.h"

extern "C" {

struct Norm {
  long rows, units;
  long bf16_added, bf16_output;  // precision of what is added, or of the states where nothing is; of the normed states
  float epsilon;
};

struct Gate {
  long rows, units;
  long gate_row, up_row;  // steps between rows
};
}

namespace {

constexpr long ROWS_OF_A_PART = 64;  // whose gradients of weights are summed by one thread
constexpr long PIECE = 4096;         // numbers of a gate that one thread works out at a time

void fetch(const void* from, long at, long count, long is_bf16, float* y) {
  if (is_bf16)
    for (long i = 0; i < count; i++) y[i] = number(static_cast<const BFloat16*>(from)[at + i]);
  else
    std::memcpy(y, static_cast<const float*>(from) + at, count * sizeof(float));
}

void deliver(const float* x, long count, long is_bf16, void* to, long at) {
  if (is_bf16)
    for (long i = 0; i < count; i++) put(static_cast<BFloat16*>(to) + at + i, x[i]);
  else
    std::memcpy(static_cast<float*>(to) + at, x, count * sizeof(float));
}

float dot(const float* x, const float* y, long padded) {
  Vector sums[2] = {};
  for (long d = 0; d < padded; d += 2 * LANES) {
    sums[0] += load(x + d) * load(y + d);
    sums[1] += load(x + d + LANES) * load(y + d + LANES);
  }
  return sum_of(sums[0] + sums[1]);
}

// Logistic function 1 / (1 + e^-x), without overflow on either side.
Vector logistic(Vector x) {
  Vector small = exponential(x > 0 ? -x : x), whole = 1 / (1 + small);
  return x > 0 ? whole : small * whole;
}

}  // namespace

extern "C" {

// y = w x / sqrt(mean(x^2) + epsilon) of x = states + added (Zhang and Sennrich 2019, equation 4), or of `added` alone
// where `states` is null. `sums` gets x where it is asked for, `scales` 1 / sqrt(..).
void norm(const Norm* of, const float* states, const void* added, const float* weight, float* sums, float* scales,
          void* output) {
  const long units = of->units, padded = filled(units, 2 * LANES);
#pragma omp parallel if (of->rows * units > 8192)
  {
    Space space(2 * padded + 64);
    float *x = space.take(padded), *more = space.take(padded);
    std::memset(x, 0, padded * sizeof(float));
#pragma omp for schedule(static)
    for (long row = 0; row < of->rows; row++) {
      const long at = row * units;
      fetch(added, at, units, of->bf16_added, x);
      if (states)
        for (long d = 0; d < units; d++) x[d] += states[at + d];
      if (sums) std::memcpy(sums + at, x, units * sizeof(float));
      const float scale = 1 / std::sqrt(dot(x, x, padded) / units + of->epsilon);
      scales[row] = scale;
      for (long d = 0; d < units; d++) more[d] = x[d] * scale * weight[d];
      deliver(more, units, of->bf16_output, output, at);
    }
  }
}

// dx = r w dy - x r^3 mean(w dy x) (+ the gradient of x itself), dw = sum over rows of dy x r, with r the scale; `x` is
// what was normed, of the precision of what was added. Null are: no gradient of x, results that are not asked for.
void norm_backward(const Norm* of, const void* x, long bf16_x, const float* weight, const float* scales,
                   const void* slope, const float* slope_of_x, float* to_states, void* to_added, float* to_weight) {
  const long units = of->units, padded = filled(units, 2 * LANES);
  const long parts = (of->rows + ROWS_OF_A_PART - 1) / ROWS_OF_A_PART;
#pragma omp parallel if (of->rows * units > 8192)
  {
    Space space(3 * padded + 64);
    float *own = space.take(padded), *y = space.take(padded), *weighted = space.take(padded);
    std::memset(own, 0, padded * sizeof(float));
    std::memset(weighted, 0, padded * sizeof(float));
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++) {
      float* sums = to_weight ? to_weight + part * units : nullptr;
      if (sums) std::memset(sums, 0, units * sizeof(float));
      for (long row = part * ROWS_OF_A_PART; row < std::min(of->rows, (part + 1) * ROWS_OF_A_PART); row++) {
        const long at = row * units;
        const float scale = scales[row];
        fetch(x, at, units, bf16_x, own);
        fetch(slope, at, units, of->bf16_output, y);
        for (long d = 0; d < units; d++) weighted[d] = weight[d] * y[d];
        if (sums)
          for (long d = 0; d < units; d++) sums[d] += y[d] * own[d] * scale;
        const float mean = dot(weighted, own, padded) / units * scale * scale;
        for (long d = 0; d < units; d++) y[d] = scale * (weighted[d] - own[d] * mean);
        if (slope_of_x)
          for (long d = 0; d < units; d++) y[d] += slope_of_x[at + d];
        if (to_states) std::memcpy(to_states + at, y, units * sizeof(float));
        if (to_added) deliver(y, units, of->bf16_added, to_added, at);
      }
    }
  }
}

}  // extern "C"

namespace {

// Calls `work(row, first, count)` for pieces of all rows; what is left of a vector at a row's end is a piece of its own.
template <class Work>
void in_pieces(const Gate& of, Work work) {
  const long pieces = (of.units + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) if (of.rows * of.units > 8192)
  for (long n = 0; n < of.rows * pieces; n++) {
    const long row = n / pieces, first = n % pieces * PIECE, end = std::min(first + PIECE, of.units);
    for (long i = first; i < end; i += LANES) work(row, i, std::min(LANES, end - i));
  }
}

template <class T>
Vector load_some(const T* x, long count) {
  if (count == LANES) return load(x);
  T some[LANES] = {};
  std::copy(x, x + count, some);
  return load(some);
}

template <class T>
void store_some(T* to, Vector x, long count) {
  if (count == LANES) return store(to, x);
  T some[LANES];
  store(some, x);
  std::copy(some, some + count, to);
}

template <class T>
void open_gate(const Gate& of, const T* gate, const T* up, T* output) {
  in_pieces(of, [=, &of](long row, long i, long count) {
    const Vector x = load_some(gate + row * of.gate_row + i, count), y = load_some(up + row * of.up_row + i, count);
    store_some(output + row * of.units + i, x * logistic(x) * y, count);
  });
}

template <class T>
void open_gate_backward(const Gate& of, const T* gate, const T* up, const T* slope, T* to_gate, T* to_up) {
  in_pieces(of, [=, &of](long row, long i, long count) {
    const Vector x = load_some(gate + row * of.gate_row + i, count), y = load_some(up + row * of.up_row + i, count);
    const Vector given = load_some(slope + row * of.units + i, count), part = logistic(x);
    store_some(to_gate + row * of.units + i, given * y * part * (1 + x * (1 - part)), count);
    store_some(to_up + row * of.units + i, given * x * part, count);
  });
}

}  // namespace

// y = silu(gate) up, with silu(x) = x logistic(x) (Shazeer 2020, equation 5), and with s = logistic(gate)
// dgate = dy up s (1 + gate (1 - s)), dup = dy gate s.
#define FUNCTIONS(T, NAME)                                                                                             \
  extern "C" void gated_##NAME(const Gate* of, const T* gate, const T* up, T* output) {                               \
    open_gate(*of, gate, up, output);                                                                                 \
  }                                                                                                                   \
  extern "C" void gated_backward_##NAME(const Gate* of, const T* gate, const T* up, const T* slope, T* to_gate,       \
                                        T* to_up) {                                                                   \
    open_gate_backward(*of, gate, up, slope, to_gate, to_up);                                                         \
  }
FUNCTIONS(float, float32)
FUNCTIONS(BFloat16, bfloat16)
