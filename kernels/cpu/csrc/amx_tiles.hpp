// Eight tiles of up to 16 rows of 64 bytes: AMX's registers, or the same in plain C++ (NEO_EMULATE_AMX) so that the
// loops over them can be tested on machines without. Tile numbers are constants of the instruction.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef NEO_EMULATE_AMX
#include <bit>
#include <cassert>
#include <cstring>
#else
#include <immintrin.h>
#endif

namespace neo {
namespace {

// Intel SDM, volume 1, chapter 18: the 64 bytes that LDTILECFG takes.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int32_t tile, int32_t tile_rows, int32_t tile_row_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
  }
};

#ifdef NEO_EMULATE_AMX

struct Tiles {
  static inline thread_local TileShapes shapes;
  static inline thread_local std::byte data[8][16][64];

  // A CPU faults on what is refused here.
  static void configure(const TileShapes& wanted) {
    for (int32_t tile = 0; tile < 8; ++tile) {
      assert(wanted.rows[tile] <= 16 && wanted.row_bytes[tile] <= 64);
      assert((wanted.rows[tile] == 0) == (wanted.row_bytes[tile] == 0));
    }
    shapes = wanted;
    std::memset(data, 0, sizeof(data));
  }
  static void release() {}

  template <int32_t tile>
  void zero() {
    std::memset(data[tile], 0, sizeof(data[tile]));
  }
  template <int32_t tile>
  void load(const void* from, std::ptrdiff_t stride) {
    zero<tile>();
    for (int32_t i = 0; i < shapes.rows[tile]; ++i) {
      std::memcpy(data[tile][i], static_cast<const std::byte*>(from) + i * stride, shapes.row_bytes[tile]);
    }
  }
  template <int32_t tile>
  void store(void* to, std::ptrdiff_t stride) const {
    for (int32_t i = 0; i < shapes.rows[tile]; ++i) {
      std::memcpy(static_cast<std::byte*>(to) + i * stride, data[tile][i], shapes.row_bytes[tile]);
    }
  }

  // c[m][n] += sum over k of a[m][k] . b[k][n], where an element is four bytes: two bf16 or four 8-bit integers.
  template <int32_t c, int32_t a, int32_t b, typename Number, typename Dot>
  void multiply(Dot dot) {
    for (int32_t m = 0; m < shapes.rows[c]; ++m) {
      for (int32_t n = 0; n < shapes.row_bytes[c] / 4; ++n) {
        Number sum;
        std::memcpy(&sum, data[c][m] + 4 * n, 4);
        for (int32_t k = 0; k < shapes.row_bytes[a] / 4; ++k) {
          sum = dot(sum, data[a][m] + 4 * k, data[b][k] + 4 * n);
        }
        std::memcpy(data[c][m] + 4 * n, &sum, 4);
      }
    }
  }
  template <int32_t c, int32_t a, int32_t b>
  void dot_bf16() {
    multiply<c, a, b, float>([](float sum, const std::byte* x, const std::byte* y) {
      for (int32_t i = 0; i < 2; ++i) {
        uint16_t p;
        uint16_t q;
        std::memcpy(&p, x + 2 * i, 2);
        std::memcpy(&q, y + 2 * i, 2);
        sum +=
            std::bit_cast<float>(static_cast<uint32_t>(p) << 16) * std::bit_cast<float>(static_cast<uint32_t>(q) << 16);
      }
      return sum;
    });
  }
  template <int32_t c, int32_t a, int32_t b>
  void dot_signed() {
    dot_bytes<c, a, b, int8_t>();
  }
  template <int32_t c, int32_t a, int32_t b>
  void dot_unsigned_signed() {
    dot_bytes<c, a, b, uint8_t>();
  }
  template <int32_t c, int32_t a, int32_t b, typename Left>
  void dot_bytes() {
    multiply<c, a, b, int32_t>([](int32_t sum, const std::byte* x, const std::byte* y) {
      for (int32_t i = 0; i < 4; ++i) {
        sum += static_cast<int32_t>(static_cast<Left>(x[i])) * static_cast<int32_t>(static_cast<int8_t>(y[i]));
      }
      return sum;
    });
  }
};

#else

// GCC's intrinsics paste the tile's number into the instruction as text, so a template's constant needs this.
struct Tiles {
  // Not GCC 12's intrinsic, which says that it reads 8 of the bytes: it never wrote the others.
  static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  // The registers' contents would else be saved at every switch of the thread.
  static void release() { _tile_release(); }

  template <int32_t tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int32_t tile>
  void load(const void* from, std::ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int32_t tile>
  void store(void* to, std::ptrdiff_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  // Operands of AT&T syntax come last to first.
  template <int32_t c, int32_t a, int32_t b>
  void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int32_t c, int32_t a, int32_t b>
  void dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  template <int32_t c, int32_t a, int32_t b>
  void dot_unsigned_signed() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

#endif

}  // namespace
}  // namespace neo
