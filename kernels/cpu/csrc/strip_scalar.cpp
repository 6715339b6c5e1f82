// The scalar twin: no intrinsics, for machines that have nothing better and as the one that the others are tested
// against.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.hpp"
#include "strip_fma.hpp"

namespace neo {
namespace {

struct Vec1 {
  static constexpr int32_t kLanes = 1;
  static constexpr int32_t kTiles = 1;
  static constexpr int32_t kColumns = 1;
  float x;

  static Vec1 all(float value) { return {value}; }
  static Vec1 load(const float* from) { return {*from}; }
  void store(float* to) const { *to = x; }
  float first() const { return x; }
  float largest() const { return x; }

  template <DType kv>
  struct Wide;
};

inline Vec1 operator+(Vec1 a, Vec1 b) { return {a.x + b.x}; }
inline Vec1 operator-(Vec1 a, Vec1 b) { return {a.x - b.x}; }
inline Vec1 operator*(Vec1 a, Vec1 b) { return {a.x * b.x}; }
inline Vec1 operator/(Vec1 a, Vec1 b) { return {a.x / b.x}; }
inline Vec1 fma(Vec1 a, Vec1 b, Vec1 c) { return {a.x * b.x + c.x}; }
inline Vec1 max(Vec1 a, Vec1 b) { return {a.x > b.x ? a.x : b.x}; }
inline bool any_greater(Vec1 a, Vec1 b) { return a.x > b.x; }
inline Vec1 where_less(Vec1 a, Vec1 b, Vec1 yes, Vec1 no) { return a.x < b.x ? yes : no; }
inline Vec1 exp(Vec1 a) { return {std::exp(std::min(88.0F, a.x) + (a.x != a.x ? a.x : 0.0F))}; }

template <typename Kv, int32_t kWidth>
struct Widen {
  static constexpr int32_t kPacked = kWidth, kBytes = sizeof(Kv);
  template <int32_t j>
  static Vec1 get(const std::byte* row, int32_t n) {
    Kv value;
    std::memcpy(&value, row + (n * kPacked + j) * sizeof(Kv), sizeof(Kv));
    if constexpr (std::is_same_v<Kv, int8_t>) {
      return {static_cast<float>(value)};
    } else {
      return {to_float(value)};
    }
  }
};
template <>
struct Vec1::Wide<DType::kFloat32> : Widen<float, 1> {};
template <>
struct Vec1::Wide<DType::kFloat16> : Widen<Float16, 1> {};
template <>
struct Vec1::Wide<DType::kBFloat16> : Widen<BFloat16, 2> {};
template <>
struct Vec1::Wide<DType::kInt8> : Widen<int8_t, 4> {};

}  // namespace

StripKernel scalar_strip(DType kv, DType) { return fma_strip<Vec1>(kv); }

}  // namespace neo
