// Attention of training and scoring (Dao et al. 2022, with the exact softmax). For a block of queries all scores that it
// sees stand in the cache; nothing but their log-sums is kept for the backward pass, which works them out again. Inputs
// and results are fp32 or bf16, sums and the softmax fp32. One thread works out each key head of a run, so that results
// do not depend on how many threads there are.
//
// Letters: N tokens, T those of a run, H heads, G heads of keys, D units of a head.

#include <memory>
#include <vector>

#include "numbers.h"

extern "C" struct Attention {
  long runs, heads, groups, units;
  float scale;
};

namespace {

constexpr long STEP = 32;  // queries and columns of a block

// C [ROWS, 2 LANES] (+)= A B: C[r, :] (+)= sum over k of a[r * row + k * step] B[k, :]
template <bool ADD>
void tile(long depth, const float* a, long row, long step, const float* b, long b_row, float* c, long c_row) {
  Vector sums[ROWS][2];
#pragma GCC unroll 8
  for (long r = 0; r < ROWS; r++)
    for (long half = 0; half < 2; half++) sums[r][half] = ADD ? load(c + r * c_row + half * LANES) : Vector{};
  for (long k = 0; k < depth; k++) {
    Vector left = load(b + k * b_row), right = load(b + k * b_row + LANES);
#pragma GCC unroll 8
    for (long r = 0; r < ROWS; r++) {
      float x = a[r * row + k * step];
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
  }
#pragma GCC unroll 8
  for (long r = 0; r < ROWS; r++)
    for (long half = 0; half < 2; half++) store(c + r * c_row + half * LANES, sums[r][half]);
}

// The same for C [rows, columns], multiples of ROWS and 2 LANES.
template <bool ADD>
void product(long rows, long columns, long depth, const float* a, long row, long step, const float* b, long b_row,
             float* c, long c_row) {
  for (long j = 0; j < columns; j += 2 * LANES)
    for (long r = 0; r < rows; r += ROWS)
      tile<ADD>(depth, a + r * row, row, step, b + j, b_row, c + r * c_row + j, c_row);
}

// What does not change within one call: tokens in runs, each token with its own start and the end of what it shares.
struct Call {
  const Attention& of;
  const int32_t *starts, *own, *shared;
  const float *cos, *sin;  // [N, D]
};

// One run of tokens, T of them; numbers of tokens and columns count from its start.
struct Run {
  const Attention& of;
  const int32_t *own, *shared;
  const float *cos, *sin;
  long start, tokens;
  long blocks = filled(tokens, STEP) / STEP, columns = blocks * STEP, width = filled(of.units, 2 * LANES);

  Run(const Call& call, long run)
      : of(call.of), own(call.own + call.starts[run]), shared(call.shared + call.starts[run]),
        cos(call.cos + call.starts[run] * of.units), sin(call.sin + call.starts[run] * of.units),
        start(call.starts[run]), tokens(call.starts[run + 1] - call.starts[run]) {}

  // Copies one head [N, heads, D] of `count` tokens to [filled_count, width], times `scale`, zeros around them.
  template <class T>
  void read(const T* x, long heads, long head, long first, long count, long filled_count, bool rotated, float scale,
            float* y) const {
    for (long i = first; i < first + count; i++, y += width) {
      const T* token = x + ((start + i) * heads + head) * of.units;
      for (long d = 0; d < of.units; d++) y[d] = scale * number(token[d]);
      for (long d = of.units; d < width; d++) y[d] = 0;
      if (rotated) rotate(y, of.units, cos + i * of.units, sin + i * of.units, 1);
    }
    std::memset(y, 0, (filled_count - count) * width * sizeof(float));
  }

  // The way back; what is given is turned in place.
  template <class T>
  void write(float* x, long heads, long head, long first, long count, bool rotated, float scale, T* y) const {
    for (long i = first; i < first + count; i++, x += width) {
      if (rotated) rotate(x, of.units, cos + i * of.units, sin + i * of.units, -1);
      T* token = y + ((start + i) * heads + head) * of.units;
      for (long d = 0; d < of.units; d++) put(token + d, scale * x[d]);
    }
  }

  // [blocks, STEP, width] to [blocks, D, STEP]
  void turn(const float* x, float* y) const {
    for (long block = 0; block < blocks; block++, x += STEP * width, y += STEP * of.units)
      for (long d = 0; d < of.units; d++)
        for (long i = 0; i < STEP; i++) y[d * STEP + i] = x[i * width + d];
  }

  // A query sees columns 0 to before shared[i], and those from here to its own.
  long from(long i) const { return shared[i] >= own[i] ? 0 : own[i]; }

  // Lists the blocks of columns that some of `rows` queries from `first` on see; `is_whole` says which all of them see.
  long list_seen(long first, long rows, long* seen, bool* is_whole) const {
    long count = 0;
    for (long left = 0; left < first + rows; left += STEP) {
      const long right = left + STEP;
      bool some = false, whole = true;
      for (long i = first; i < first + rows; i++) {
        some |= shared[i] > left || (from(i) < right && i >= left);
        whole &= shared[i] >= right || (from(i) <= left && i >= right - 1);
      }
      if (some) is_whole[count] = whole, seen[count++] = left / STEP;
    }
    return count;
  }

  // Products of queries [rows, width] with the blocks of columns that they see, [rows, num_seen * STEP].
  void multiply(long rows, const float* queries, const float* turned, const long* seen, long num_seen, float* y) const {
    for (long n = 0; n < num_seen; n++)
      product<false>(rows, STEP, of.units, queries, width, 1, turned + seen[n] * STEP * of.units, STEP, y + n * STEP,
                     columns);
  }

  // Scores of columns that a query does not see become the lowest.
  void hide(long first, long rows, const long* seen, const bool* is_whole, long num_seen, float* scores) const {
    for (long n = 0; n < num_seen; n++, scores += STEP) {
      if (is_whole[n]) continue;
      for (long r = 0; r < rows; r++) {
        const int token = int(first + r), start = int(from(token)), prompt = shared[token], left = int(seen[n] * STEP);
        float* x = scores + r * columns;
        for (int c = 0; c < int(STEP); c++) {
          const bool is_seen = (left + c >= start && left + c <= token) || left + c < prompt;
          x[c] = is_seen ? x[c] : LOWEST;
        }
      }
    }
  }
};

// P = softmax(scale Q K^T + mask), O = P V, for the queries of one key head in one run.
template <class T>
void attend(const Call& call, long number_of_run, long group, const T* query, const T* key, const T* value, T* output,
            float* log_sums) {
  const Attention& of = call.of;
  const Run run(call, number_of_run);
  const long width = run.width, columns = run.columns, sharing = of.heads / of.groups;
  Space space(columns * (2 * width + of.units) + STEP * (2 * width + columns) + 128);
  float *keys = space.take(columns * width), *turned = space.take(columns * of.units);
  float *values = space.take(columns * width), *scores = space.take(STEP * columns);
  float *queries = space.take(STEP * width), *mixed = space.take(STEP * width);
  std::vector<long> seen(run.blocks);
  std::unique_ptr<bool[]> is_whole(new bool[run.blocks]);
  run.read(key, of.groups, group, 0, run.tokens, columns, true, 1, keys);
  run.read(value, of.groups, group, 0, run.tokens, columns, false, 1, values);
  run.turn(keys, turned);
  for (long first = 0; first < run.tokens; first += STEP) {
    const long rows = std::min(STEP, run.tokens - first), filled_rows = filled(rows, ROWS);
    const long num_seen = run.list_seen(first, rows, seen.data(), is_whole.get());
    for (long head = group * sharing; head < (group + 1) * sharing; head++) {
      run.read(query, of.heads, head, first, rows, filled_rows, true, of.scale, queries);
      run.multiply(filled_rows, queries, turned, seen.data(), num_seen, scores);
      run.hide(first, rows, seen.data(), is_whole.get(), num_seen, scores);
      for (long r = 0; r < rows; r++) {
        float* x = scores + r * columns;
        float top;
        const float sum = soften(x, num_seen * STEP, &top);
        log_sums[(run.start + first + r) * of.heads + head] = top + std::log(sum);
        for (long c = 0; c < num_seen * STEP; c += LANES) store(x + c, load(x + c) * (1 / sum));
      }
      std::memset(mixed, 0, filled_rows * width * sizeof(float));
      for (long n = 0; n < num_seen; n++)
        product<true>(filled_rows, width, STEP, scores + n * STEP, columns, 1, values + seen[n] * STEP * width, width,
                      mixed, width);
      run.write(mixed, of.heads, head, first, rows, false, 1, output);
    }
  }
}

// dV = P^T dO, dP = dO V^T, dS = P (dP - sum over columns of P dP), dQ = scale dS K, dK = scale dS^T Q
template <class T>
void attend_backward(const Call& call, long number_of_run, long group, const T* query, const T* key, const T* value,
                     const T* slope, const float* log_sums, T* to_query, T* to_key, T* to_value) {
  const Attention& of = call.of;
  const Run run(call, number_of_run);
  const long width = run.width, columns = run.columns, sharing = of.heads / of.groups;
  Space space(columns * (4 * width + 2 * of.units) + STEP * (3 * width + 2 * columns) + 256);
  float *keys = space.take(columns * width), *turned_keys = space.take(columns * of.units);
  float *values = space.take(columns * width), *turned_values = space.take(columns * of.units);
  float *to_keys = space.take(columns * width), *to_values = space.take(columns * width);
  float *weights = space.take(STEP * columns), *slopes = space.take(STEP * columns);
  float *queries = space.take(STEP * width), *outputs = space.take(STEP * width), *to_queries = space.take(STEP * width);
  std::vector<long> seen(run.blocks);
  std::unique_ptr<bool[]> is_whole(new bool[run.blocks]);
  run.read(key, of.groups, group, 0, run.tokens, columns, true, 1, keys);
  run.read(value, of.groups, group, 0, run.tokens, columns, false, 1, values);
  run.turn(keys, turned_keys);
  run.turn(values, turned_values);
  std::memset(to_keys, 0, columns * width * sizeof(float));
  std::memset(to_values, 0, columns * width * sizeof(float));
  for (long first = 0; first < run.tokens; first += STEP) {
    const long rows = std::min(STEP, run.tokens - first), filled_rows = filled(rows, ROWS);
    const long num_seen = run.list_seen(first, rows, seen.data(), is_whole.get());
    for (long head = group * sharing; head < (group + 1) * sharing; head++) {
      run.read(query, of.heads, head, first, rows, filled_rows, true, of.scale, queries);
      run.read(slope, of.heads, head, first, rows, filled_rows, false, 1, outputs);
      run.multiply(filled_rows, queries, turned_keys, seen.data(), num_seen, weights);
      run.multiply(filled_rows, outputs, turned_values, seen.data(), num_seen, slopes);
      run.hide(first, rows, seen.data(), is_whole.get(), num_seen, weights);
      for (long r = 0; r < rows; r++) {
        float *p = weights + r * columns, *s = slopes + r * columns;
        const float log_sum = log_sums[(run.start + first + r) * of.heads + head];
        Vector sums{};
        for (long c = 0; c < num_seen * STEP; c += LANES) {
          Vector y = exponential(load(p + c) - log_sum);
          sums += y * load(s + c);
          store(p + c, y);
        }
        const float mean = sum_of(sums);
        for (long c = 0; c < num_seen * STEP; c += LANES) store(s + c, load(p + c) * (load(s + c) - mean));
      }
      std::memset(to_queries, 0, filled_rows * width * sizeof(float));
      for (long n = 0; n < num_seen; n++) {
        const long at = seen[n] * STEP * width;
        const float *p = weights + n * STEP, *s = slopes + n * STEP;
        product<true>(filled_rows, width, STEP, s, columns, 1, keys + at, width, to_queries, width);
        product<true>(STEP, width, rows, s, 1, columns, queries, width, to_keys + at, width);
        product<true>(STEP, width, rows, p, 1, columns, outputs, width, to_values + at, width);
      }
      run.write(to_queries, of.heads, head, first, rows, true, of.scale, to_query);
    }
  }
  run.write(to_keys, of.groups, group, 0, run.tokens, true, 1, to_key);
  run.write(to_values, of.groups, group, 0, run.tokens, false, 1, to_value);
}

template <class T>
void attend_all(const Call& call, const T* query, const T* key, const T* value, T* output, float* log_sums) {
#pragma omp parallel for schedule(dynamic)
  for (long n = 0; n < call.of.runs * call.of.groups; n++)
    attend(call, n / call.of.groups, n % call.of.groups, query, key, value, output, log_sums);
}

template <class T>
void attend_all_backward(const Call& call, const T* query, const T* key, const T* value, const T* slope,
                         const float* log_sums, T* to_query, T* to_key, T* to_value) {
#pragma omp parallel for schedule(dynamic)
  for (long n = 0; n < call.of.runs * call.of.groups; n++)
    attend_backward(call, n / call.of.groups, n % call.of.groups, query, key, value, slope, log_sums, to_query, to_key,
                    to_value);
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                             \
  extern "C" void attend_##NAME(const Attention* of, const int32_t* starts, const int32_t* own, const int32_t* shared, \
                                const float* cos, const float* sin, const T* query, const T* key, const T* value,     \
                                T* output, float* log_sums) {                                                         \
    attend_all(Call{*of, starts, own, shared, cos, sin}, query, key, value, output, log_sums);                        \
  }                                                                                                                   \
  extern "C" void attend_backward_##NAME(const Attention* of, const int32_t* starts, const int32_t* own,              \
                                         const int32_t* shared, const float* cos, const float* sin, const T* query,   \
                                         const T* key, const T* value, const T* slope, const float* log_sums,         \
                                         T* to_query, T* to_key, T* to_value) {                                       \
    attend_all_backward(Call{*of, starts, own, shared, cos, sin}, query, key, value, slope, log_sums, to_query,       \
                        to_key, to_value);                                                                            \
  }
FUNCTIONS(float, float32)
FUNCTIONS(BFloat16, bfloat16)
