#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kv_piece.hpp"

namespace neo {
namespace {

constexpr int32_t kMaxGroup = 16;
constexpr int32_t kMaxDim = 256;
constexpr int32_t kMaxBlock = 64;
// Below this many KV bytes a second thread costs more than it saves.
constexpr std::size_t kBytesWorthThreads = 64 << 10;

// Running softmax of one group of query heads that share a KV head.
struct GroupState {
  float q[kMaxGroup][kMaxDim];
  float acc[kMaxGroup][kMaxDim];
  float top[kMaxGroup];
  float sum[kMaxGroup];
};

template <typename Kv>
void widen(const Kv* row, float scale, float* out, int32_t dim) {
  for (int32_t i = 0; i < dim; ++i) {
    if constexpr (std::is_same_v<Kv, int8_t>) {
      out[i] = static_cast<float>(row[i]) * scale;
    } else {
      out[i] = to_float(row[i]);
    }
  }
}

// Tokens [begin, end) of one block, in one pass over K and one over V.
template <typename Kv>
void attend_block(GroupState& state, std::byte* piece, const KvLayout& layout, const PieceShape& shape,
                  const AttentionParams& params, int32_t head, int32_t group, int32_t begin, int32_t end) {
  const int32_t dim = layout.head_dim;
  float scores[kMaxGroup][kMaxBlock];
  float row[kMaxDim];
  for (int32_t t = begin; t < end; ++t) {
    widen(piece_row<Kv>(piece, layout, shape, 0, head, t),
          std::is_same_v<Kv, int8_t> ? *piece_scale(piece, layout, shape, 0, head, t) : 1.0F, row, dim);
    for (int32_t g = 0; g < group; ++g) {
      float lanes[16] = {};
      for (int32_t i = 0; i < dim; i += 16) {
        for (int32_t j = 0; j < 16; ++j) {
          lanes[j] += state.q[g][i + j] * row[i + j];
        }
      }
      float dot = 0.0F;
      for (const float lane : lanes) {
        dot += lane;
      }
      scores[g][t] = params.softcap > 0.0F ? params.softcap * std::tanh(dot / params.softcap) : dot;
    }
  }
  for (int32_t g = 0; g < group; ++g) {
    float top = state.top[g];
    for (int32_t t = begin; t < end; ++t) {
      top = std::isnan(scores[g][t]) ? scores[g][t] : std::max(top, scores[g][t]);
    }
    const float shrink = state.top[g] == top ? 1.0F : std::exp(state.top[g] - top);
    state.top[g] = top;
    state.sum[g] *= shrink;
    for (int32_t i = 0; i < dim; ++i) {
      state.acc[g][i] *= shrink;
    }
    for (int32_t t = begin; t < end; ++t) {
      scores[g][t] = std::exp(scores[g][t] - top);
      state.sum[g] += scores[g][t];
    }
  }
  for (int32_t t = begin; t < end; ++t) {
    widen(piece_row<Kv>(piece, layout, shape, 1, head, t),
          std::is_same_v<Kv, int8_t> ? *piece_scale(piece, layout, shape, 1, head, t) : 1.0F, row, dim);
    for (int32_t g = 0; g < group; ++g) {
      for (int32_t i = 0; i < dim; ++i) {
        state.acc[g][i] += scores[g][t] * row[i];
      }
    }
  }
}

// One KV head of one row: append, then attend.
template <typename Kv, typename T>
void attend_head(const KvPool& pool, int32_t layer, const AttentionParams& params, const AttentionBatch& batch,
                 int32_t row, int32_t head) {
  const KvLayout& layout = pool.layout();
  const PieceShape shape(layout);
  const int32_t dim = layout.head_dim;
  const int32_t group = params.query_heads / layout.kv_heads;
  const int32_t length = batch.lengths[row];
  const int32_t* table = batch.block_tables + static_cast<std::size_t>(row) * batch.table_stride;
  if (batch.k_new != nullptr) {
    const int32_t last = length - 1;
    std::byte* piece = pool.piece(layer, table[last / layout.block_tokens]);
    const std::size_t at = (static_cast<std::size_t>(row) * layout.kv_heads + head) * dim;
    for (int half = 0; half < 2; ++half) {
      const T* source = static_cast<const T*>(half == 0 ? batch.k_new : batch.v_new) + at;
      const int32_t offset = last % layout.block_tokens;
      store_row(source, piece_row<Kv>(piece, layout, shape, half, head, offset),
                piece_scale(piece, layout, shape, half, head, offset), dim);
    }
  }
  GroupState state;
  const std::size_t first_head = static_cast<std::size_t>(row) * params.query_heads + head * group;
  for (int32_t g = 0; g < group; ++g) {
    const T* q = static_cast<const T*>(batch.q) + (first_head + g) * dim;
    for (int32_t i = 0; i < dim; ++i) {
      state.q[g][i] = to_float(q[i]) * params.scale;
      state.acc[g][i] = 0.0F;
    }
    state.top[g] = -std::numeric_limits<float>::infinity();
    state.sum[g] = 0.0F;
  }
  const int32_t start = params.window > 0 ? std::max(0, length - params.window) : 0;
  for (int32_t at = start; at < length;) {
    const int32_t begin = at % layout.block_tokens;
    const int32_t end = std::min(layout.block_tokens, begin + length - at);
    attend_block<Kv>(state, pool.piece(layer, table[at / layout.block_tokens]), layout, shape, params, head, group,
                     begin, end);
    at += end - begin;
  }
  for (int32_t g = 0; g < group; ++g) {
    T* out = static_cast<T*>(batch.out) + (first_head + g) * dim;
    for (int32_t i = 0; i < dim; ++i) {
      out[i] = from_float<T>(state.acc[g][i] / state.sum[g]);
    }
    if (batch.lse != nullptr) {
      batch.lse[first_head + g] = state.top[g] + std::log(state.sum[g]);
    }
  }
}

}  // namespace

void check_batch(const KvPool& pool, const AttentionParams& params, const AttentionBatch& batch) {
  const KvLayout& layout = pool.layout();
  const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
  if (params.query_heads < layout.kv_heads || params.query_heads % layout.kv_heads != 0 ||
      params.query_heads / layout.kv_heads > kMaxGroup) {
    fail("query_heads must be 1 to 16 times kv_heads");
  }
  if (params.activation == DType::kInt8) {
    fail("q, k and v cannot be int8");
  }
  if (batch.rows < 0 || params.window < 0) {
    fail("rows and window must not be negative");
  }
  for (int32_t row = 0; row < batch.rows; ++row) {
    const int32_t length = batch.lengths[row];
    const int64_t used = (static_cast<int64_t>(length) + layout.block_tokens - 1) / layout.block_tokens;
    if (length < 1 || used > batch.table_stride) {
      fail("length " + std::to_string(length) + " of row " + std::to_string(row) +
           " is not between 1 and what its block table holds");
    }
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = batch.block_tables[static_cast<std::size_t>(row) * batch.table_stride + i];
      if (block < 0 || block >= pool.blocks()) {
        fail("block id " + std::to_string(block) + " of row " + std::to_string(row) + " is outside the pool");
      }
    }
  }
}

void decode_attention(ThreadPool& threads, const KvPool& pool, int32_t layer, const AttentionParams& params,
                      const AttentionBatch& batch) {
  const KvLayout& layout = pool.layout();
  const int32_t heads = layout.kv_heads;
  const auto item = [&](int32_t i) {
    with_type(params.activation, [&]<typename T>(T) {
      if constexpr (!std::is_same_v<T, int8_t>) {
        with_type(layout.dtype, [&]<typename Kv>(Kv) {
          attend_head<Kv, T>(pool, layer, params, batch, i / heads, i % heads);
        });
      }
    });
  };
  std::size_t tokens = 0;
  for (int32_t row = 0; row < batch.rows; ++row) {
    tokens += batch.lengths[row];
  }
  if (tokens * layout.piece_bytes() / layout.block_tokens < kBytesWorthThreads) {
    for (int32_t i = 0; i < batch.rows * heads; ++i) {
      item(i);
    }
    return;
  }
  threads.run(batch.rows * heads, item);
}

}  // namespace neo
