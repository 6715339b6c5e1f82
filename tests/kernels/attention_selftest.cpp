// The attention kernel against a plain one in double, without Python: for CPUs that are emulated (test_cpu_builds.py).
// Exits with the number of results that are wrong. NEO_CPU_ISA picks the loops.
#include <cmath>
#include <cstdio>
#include <iterator>
#include <optional>
#include <random>
#include <vector>

#include "attention.hpp"
#include "isa.hpp"
#include "kv_piece.hpp"

namespace {

using namespace neo;

constexpr int32_t kHeads = 6;
constexpr int32_t kKvHeads = 2;
constexpr int32_t kLengths[] = {1, 16, 17, 63, 64, 65, 200, 1100};
constexpr int32_t kRows = std::size(kLengths);
constexpr int32_t kStride = (1100 + 15) / 16;

struct Sequences {
  Sequences(DType dtype, int32_t head_dim) : dim(head_dim), layout{1, kKvHeads, head_dim, 16, dtype} {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    // All bits set is NaN in every float format: what is read beyond a sequence's end would show.
    memory.resize(layout.piece_bytes() * kRows * kStride + 64, std::byte{0xFF});
    auto* first = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    pool.emplace(layout, kRows * kStride, std::span(first, layout.piece_bytes() * kRows * kStride));
    const PieceShape shape(layout);
    for (int32_t i = 0; i < kRows * kStride; ++i) {
      tables.push_back((i * 7 + 3) % (kRows * kStride));  // 552 is no multiple of 7: a permutation
    }
    q.resize(kRows * kHeads * dim);
    for (float& x : q) {
      x = normal(random);
    }
    for (int32_t row = 0; row < kRows; ++row) {
      for (int32_t i = 0; i < kLengths[row] * kKvHeads * 2; ++i) {
        const int32_t token = i / (2 * kKvHeads);
        std::vector<float> x(dim);
        for (float& value : x) {
          value = normal(random);
        }
        std::byte* region = pool->piece(0, tables[row * kStride + token / 16]) + i / 2 % kKvHeads * shape.region_bytes;
        with_type(dtype, [&]<typename Kv>(Kv) {
          const TokenPlace<Kv> place = place_of<Kv>(region, layout, shape, i % 2, token % 16);
          store_token<Kv>(x.data(), place, dim);
          load_token<Kv>(place, x.data(), dim);
        });
        kv.insert(kv.end(), x.begin(), x.end());
      }
    }
  }

  int32_t dim;
  KvLayout layout;
  std::vector<std::byte> memory;
  std::optional<KvPool> pool;
  std::vector<int32_t> tables;
  std::vector<float> q;
  std::vector<float> kv;  // [all tokens, kv head, K or V, dim] as stored
};

double dot(const float* a, const float* b, int32_t count) {
  double sum = 0;
  for (int32_t i = 0; i < count; ++i) {
    sum += static_cast<double>(a[i]) * b[i];
  }
  return sum;
}

int32_t wrong_heads(const Sequences& s, const std::vector<float>& out) {
  int32_t wrong = 0;
  const float* first = s.kv.data();
  for (int32_t row = 0; row < kRows; first += kLengths[row++] * kKvHeads * 2 * s.dim) {
    for (int32_t head = 0; head < kHeads; ++head) {
      const float* q = s.q.data() + (row * kHeads + head) * s.dim;
      std::vector<double> expected(s.dim);
      double sum = 0;
      for (int32_t token = 0; token < kLengths[row]; ++token) {
        const float* k = first + (token * kKvHeads + head / (kHeads / kKvHeads)) * 2 * s.dim;
        const double weight = std::exp(dot(q, k, s.dim) / std::sqrt(s.dim));
        sum += weight;
        for (int32_t i = 0; i < s.dim; ++i) {
          expected[i] += weight * k[s.dim + i];
        }
      }
      double error = 0;
      for (int32_t i = 0; i < s.dim; ++i) {
        const double off = std::fabs(out[(row * kHeads + head) * s.dim + i] - expected[i] / sum);
        error = off <= error ? error : off;  // a NaN stays
      }
      wrong += error < 1e-5 ? 0 : 1;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  int32_t wrong = 0;
  ThreadPool threads(2);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8}) {
    for (const int32_t dim : {16, 64, 128}) {
      const Sequences s(dtype, dim);
      std::vector<float> out(s.q.size());
      const AttentionParams params{kHeads, DType::kFloat32, 1.0F / std::sqrt(static_cast<float>(dim)), 0, 0.0F};
      const AttentionBatch batch{kRows,   kLengths, s.tables.data(), kStride, s.q.data(),
                                 nullptr, nullptr,  out.data(),      nullptr};
      check_batch(*s.pool, params, batch);
      decode_attention(threads, *s.pool, 0, params, batch);
      wrong += wrong_heads(s, out);
      if (wrong_heads(s, std::vector<float>(out.size())) != kRows * kHeads) {
        ++wrong;  // the comparison has to fail for zeros
      }
    }
  }
  std::printf("%s: %d wrong\n", isa_name(threads.isa().isa), wrong);
  return wrong;
}
