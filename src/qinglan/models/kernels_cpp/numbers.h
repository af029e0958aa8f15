// Vectors of the processor's width, precisions, and what several kernels need.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __AVX512F__
constexpr long LANES = 16, ROWS = 8;  // sums of a tile fill 2 ROWS registers of LANES numbers
#else
constexpr long LANES = 8, ROWS = 4;
#endif
constexpr float LOWEST = -1e30f;  // of what a query does not see: finite, so that a row that sees nothing has no NaN

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* x) {
  Vector y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline void store(float* x, Vector y) { std::memcpy(x, &y, sizeof y); }

inline float sum_of(Vector x) {
  float sum = 0;
  for (long lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

// The sums of LANES vectors, one in each lane.
inline Vector sums_of(Vector* x) {
  Integers even, odd;
  for (int lane = 0; lane < int(LANES); lane++) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
#pragma GCC unroll 4
  for (long left = LANES / 2; left > 0; left /= 2)  // each half of a result holds what is left of one vector
#pragma GCC unroll 8
    for (long i = 0; i < left; i++)
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) + __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
  return x[0];
}

struct BFloat16 {
  uint16_t bits;
};

inline float number(float x) { return x; }

inline float number(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void put(float* to, float x) { *to = x; }

inline void put(BFloat16* to, float x) {  // to the nearest, of two the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// LANES numbers of either precision.
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vector load(const BFloat16* x) {
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  Integers bits = __builtin_convertvector(halves, Integers) << 16;
  Vector y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void store(BFloat16* to, Vector x) {
  Integers bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x == x ? ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff : Integers{} + 0x7fc0;
  Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// e^x for x <= 0 to 1 unit in the last place: 2^n e^r with |r| <= ln(2) / 2, e^r by a polynomial (Cephes' expf).
// Below -87, where fp32 ends, it is 0; what is not a number stays none, so that damage is seen.
inline Vector exponential(Vector x) {
  constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded, and stands in the lowest bits
  Vector shifted = x * 1.44269504f + ROUNDER, n = shifted - ROUNDER;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Integers power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &y, sizeof bits);
  bits += power << 23;
  std::memcpy(&y, &bits, sizeof y);
  return x > -87.0f ? y : x == x ? Vector{} : x;
}

// Numbers become e^(x - the largest); returns their sum. `largest` gets that number.
inline float soften(float* x, long count, float* largest = nullptr) {
  Vector most = Vector{} + LOWEST, sums{};
  for (long i = 0; i < count; i += LANES) {
    Vector y = load(x + i);
    most = y > most ? y : most;
  }
  float top = LOWEST;
  for (long lane = 0; lane < LANES; lane++) top = std::max(top, most[lane]);
  for (long i = 0; i < count; i += LANES) {
    Vector y = exponential(load(x + i) - top);
    sums += y;
    store(x + i, y);
  }
  if (largest) *largest = top;
  return sum_of(sums);
}

inline long filled(long number, long step) { return (number + step - 1) / step * step; }

// Room for numbers, taken piece by piece.
class Space {
 public:
  explicit Space(long size) : start(static_cast<float*>(std::aligned_alloc(64, filled(4 * size, 64)))), next(start) {
    if (!start) throw std::bad_alloc();
  }
  ~Space() { std::free(start); }
  Space(const Space&) = delete;
  float* take(long size) {
    float* piece = next;
    next += filled(size, 16);
    return piece;
  }

 private:
  float *start, *next;
};

// The first half y1 = x1 cos - x2 sin, the second y2 = x2 cos + x1 sin; way -1 turns back (Su et al. 2021, equation 34).
inline void rotate(float* x, long units, const float* cos, const float* sin, float way) {
  long half = units / 2;
  for (long d = 0; d < half; d++) {
    float first = x[d], second = x[d + half];
    x[d] = first * cos[d] - way * second * sin[d];
    x[d + half] = second * cos[d + half] + way * first * sin[d + half];
  }
}
