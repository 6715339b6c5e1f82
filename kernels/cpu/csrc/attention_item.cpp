#include "attention_item.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace neo {
namespace {

Tile tile_at(const Call& call, int32_t row, int32_t head, int32_t token) {
  const KvLayout& layout = call.pool.layout();
  const std::byte* region = call.region(row, head, token);
  const int32_t offset = token % layout.block_tokens;
  const std::size_t bytes = static_cast<std::size_t>(offset) * layout.head_dim * call.shape.width;
  Tile tile{region + bytes, region + call.shape.half_bytes + bytes, nullptr, nullptr};
  if (call.shape.scale_bytes != 0) {
    tile.k_scale = reinterpret_cast<const float*>(region + 2 * call.shape.half_bytes) + offset;
    tile.v_scale = reinterpret_cast<const float*>(region + 2 * call.shape.half_bytes + call.shape.scale_bytes) + offset;
  }
  return tile;
}

// The strip's tiles; returns how many there are. Those beyond repeat the last.
int32_t find_tiles(const Call& call, const ChunkPlan& chunk, int32_t head, int32_t strip, Tile* tiles) {
  const int32_t first = chunk.begin + strip * kStripTokens;
  const int32_t count = std::min(kStripTiles, (chunk.end - first + kTileTokens - 1) / kTileTokens);
  for (int32_t t = 0; t < kStripTiles; ++t) {
    tiles[t] = t < count ? tile_at(call, chunk.row, head, first + t * kTileTokens) : tiles[count - 1];
  }
  return count;
}

// Copies a tile of V, whose rows hold `packed` tokens each, with zeros for tokens outside of [begin, end).
void copy_tokens(std::byte* to, const std::byte* from, int32_t packed, std::size_t row_bytes, int32_t begin,
                 int32_t end) {
  for (int32_t token = 0; token < kTileTokens; token += packed, to += row_bytes, from += row_bytes) {
    const int32_t inside = std::min(end, token + packed) - std::max(begin, token);
    if (inside == packed) {
      std::memcpy(to, from, row_bytes);
    } else if (inside <= 0) {
      std::memset(to, 0, row_bytes);
    } else {  // one of a pair, in half of each word
      const uint32_t mask = token >= begin ? 0x0000FFFFU : 0xFFFF0000U;
      const auto* source = reinterpret_cast<const uint32_t*>(from);
      auto* target = reinterpret_cast<uint32_t*>(to);
      for (std::size_t i = 0; i < row_bytes / sizeof(uint32_t); ++i) {
        target[i] = source[i] & mask;
      }
    }
  }
}

// V of tokens that are not attended is multiplied by weight 0, which a NaN left there would survive: the at most two
// tiles that have such tokens are replaced by copies without. Int8 has no NaN; its scales are masked with the weights.
struct CleanV {
  alignas(64) std::byte tiles[2][kTileTokens * kMaxDim * sizeof(float)];

  void replace(const Call& call, Strip& strip) {
    const KvLayout& layout = call.pool.layout();
    if (layout.dtype == DType::kInt8) {
      return;
    }
    int32_t used = 0;
    for (int32_t t = 0; t < strip.count; ++t) {
      const int32_t begin = strip.begin - t * kTileTokens;
      const int32_t end = strip.end - t * kTileTokens;
      if (begin <= 0 && end >= kTileTokens) {
        continue;
      }
      if (end <= 0 || begin >= kTileTokens) {  // before the window: a whole tile of strangers
        begin >= kTileTokens ? skip(strip, t) : void();
        continue;
      }
      std::byte* clean = tiles[used++];
      const int32_t packed = layout.dtype == DType::kBFloat16 ? 2 : 1;
      copy_tokens(clean, strip.tiles[t].v, packed, packed * layout.head_dim * call.shape.width, begin, end);
      strip.tiles[t].v = clean;
    }
  }
  static void skip(Strip& strip, int32_t t) { strip.tiles[t].v = zeros; }
  alignas(64) static constexpr std::byte zeros[kTileTokens * kMaxDim * sizeof(float)] = {};
};

void append(const Call& call, int32_t row, int32_t head) {
  const KvLayout& layout = call.pool.layout();
  const int32_t last = call.batch.lengths[row] - 1;
  const std::size_t at = (static_cast<std::size_t>(row) * layout.kv_heads + head) * layout.head_dim;
  with_type(call.params.activation, [&]<typename T>(T) {
    if constexpr (!std::is_same_v<T, int8_t>) {
      with_type(layout.dtype, [&]<typename Kv>(Kv) {
        std::byte* region = call.region(row, head, last);
        for (int half = 0; half < 2; ++half) {
          const void* source = half == 0 ? call.batch.k_new : call.batch.v_new;
          store_token<Kv>(static_cast<const T*>(source) + at,
                          place_of<Kv>(region, layout, call.shape, half, last % layout.block_tokens), layout.head_dim);
        }
      });
    }
  });
}

void start(const Call& call, HeadState& state, std::size_t first_head) {
  const int32_t count = state.group * state.dim;
  with_type(call.params.activation, [&]<typename T>(T) {
    if constexpr (!std::is_same_v<T, int8_t>) {
      const T* q = static_cast<const T*>(call.batch.q) + first_head * state.dim;
      for (int32_t i = 0; i < count; ++i) {
        state.q[i] = to_float(q[i]);
      }
      for (int32_t i = 0; i < count; i += 64 / static_cast<int32_t>(sizeof(T))) {
        __builtin_prefetch(q + count + i, 0, 2);  // of the next KV head
      }
    }
  });
  if (call.kernel.prepare != nullptr) {
    call.kernel.prepare(state);
  }
}

void start_part(HeadState& state) {
  std::fill_n(state.acc, state.group * state.dim, 0.0F);
  std::fill_n(state.top, state.group, kNoScore);
  std::fill_n(state.sum[0], state.group * 16, 0.0F);
}

// One query head's result to `out` and `lse`.
void finish(const Call& call, std::size_t query_head, const float* acc, float top, float sum) {
  const int32_t dim = call.pool.layout().head_dim;
  const float inverse = 1.0F / sum;
  with_type(call.params.activation, [&]<typename T>(T) {
    if constexpr (!std::is_same_v<T, int8_t>) {
      if (call.kernel.store != nullptr) {
        call.kernel.store(acc, inverse, dim, static_cast<T*>(call.batch.out) + query_head * dim);
        return;
      }
      T* out = static_cast<T*>(call.batch.out) + query_head * dim;
      for (int32_t i = 0; i < dim; ++i) {
        out[i] = from_float<T>(acc[i] * inverse);
      }
    }
  });
  if (call.batch.lse != nullptr) {
    call.batch.lse[query_head] = top + std::log(sum);
  }
}

// The softmax of some tokens of one query head: of a part, or of all parts folded so far.
struct Softmax {
  float top;
  float sum;
  float* acc;  // [dim]

  // The only place where parts of a row meet: always in order, whoever does it.
  void fold(const StripKernel& kernel, const Softmax& other, int32_t dim) {
    const float highest = std::max(top, other.top);
    const float weight = std::exp(top - highest);
    const float its_weight = std::exp(other.top - highest);
    top = highest;
    sum = weight * sum + its_weight * other.sum;
    if (kernel.fold != nullptr) {
      kernel.fold(acc, weight, other.acc, its_weight, dim);
      return;
    }
    for (int32_t d = 0; d < dim; ++d) {
      acc[d] = weight * acc[d] + its_weight * other.acc[d];
    }
  }
};

// Of one part's result in the list of partial ones.
std::size_t partial_place(const Call& call, const ChunkPlan& chunk, int32_t part, int32_t query_head) {
  return static_cast<std::size_t>(chunk.partial + part) * call.params.query_heads + query_head;
}

Softmax partial_of(const Call& call, const ChunkPlan& chunk, int32_t part, int32_t query_head) {
  const std::size_t at = partial_place(call, chunk, part, query_head);
  return {call.stats[2 * at], call.stats[2 * at + 1], call.accs + at * call.pool.layout().head_dim};
}

// All parts of a row that was cut into chunks.
void merge(const Call& call, const ChunkPlan& chunk, int32_t query_head) {
  const int32_t dim = call.pool.layout().head_dim;
  Softmax all = partial_of(call, chunk, 0, query_head);
  for (int32_t i = 1; i < chunk.parts; ++i) {
    all.fold(call.kernel, partial_of(call, chunk, i, query_head), dim);
  }
  finish(call, static_cast<std::size_t>(chunk.row) * call.params.query_heads + query_head, all.acc, all.top, all.sum);
}

// What the parts of a row in one chunk have folded into so far, for one KV head.
struct Folded {
  float stats[kMaxGroup][2];
  alignas(64) float acc[kMaxGroup * kMaxDim];
};

// A part of the row is done: stores it, or folds it and after the last one stores the result.
void keep(const Call& call, const ChunkPlan& chunk, HeadState& state, int32_t head, int32_t part, Folded& folded) {
  for (int32_t g = 0; g < state.group; ++g) {
    const int32_t query_head = head * state.group + g;
    const Softmax mine{state.top[g], std::accumulate(state.sum[g], state.sum[g] + 16, 0.0F), state.acc + g * state.dim};
    if (chunk.partial >= 0) {
      const std::size_t at = partial_place(call, chunk, part, query_head);
      call.stats[2 * at] = mine.top;
      call.stats[2 * at + 1] = mine.sum;
      std::copy_n(mine.acc, state.dim, call.accs + at * state.dim);
      continue;
    }
    Softmax all = mine;
    if (chunk.parts > 1) {
      all = {folded.stats[g][0], folded.stats[g][1], folded.acc + g * state.dim};
      if (part == 0) {
        std::copy_n(mine.acc, state.dim, all.acc);
        all.top = mine.top;
        all.sum = mine.sum;
      } else {
        all.fold(call.kernel, mine, state.dim);
      }
      folded.stats[g][0] = all.top;
      folded.stats[g][1] = all.sum;
    }
    if (part + 1 == chunk.parts) {
      finish(call, static_cast<std::size_t>(chunk.row) * call.params.query_heads + query_head, all.acc, all.top,
             all.sum);
    }
  }
}

// The strips of one head, part by part, then those of the next, each prefetching what follows; the last one the start
// of `next`.
void attend_item(const Call& call, const Item& item, const std::optional<Work>& next) {
  const ChunkPlan& chunk = item.chunk;
  HeadState state;
  state.group = call.group();
  state.dim = call.pool.layout().head_dim;
  state.scale = call.params.scale;
  state.softcap = call.params.softcap;
  const int32_t length = call.batch.lengths[chunk.row];
  if (call.batch.k_new != nullptr && chunk.end == length) {
    for (int32_t h = item.head; h < item.last; ++h) {
      append(call, chunk.row, h);
    }
  }
  const int32_t begin = std::max(chunk.begin, first_token(length, call.params.window));
  const int32_t strips = (chunk.end - chunk.begin + kStripTokens - 1) / kStripTokens;
  const int32_t part_strips = chunk.part / kStripTokens;
  CleanV clean;
  Folded folded;
  Strip strip;
  int32_t next_count = find_tiles(call, chunk, item.head, 0, strip.next);
  for (int32_t head = item.head; head < item.last; ++head) {
    start(call, state, static_cast<std::size_t>(chunk.row) * call.params.query_heads + head * state.group);
    for (int32_t i = 0; i < strips; ++i) {
      if (i % part_strips == 0) {
        start_part(state);
      }
      std::copy_n(strip.next, kStripTiles, strip.tiles);
      strip.count = next_count;
      const int32_t first = chunk.begin + i * kStripTokens;
      strip.begin = std::max(0, begin - first);
      strip.end = std::min(kStripTokens, chunk.end - first);
      if (i + 1 < strips) {
        next_count = find_tiles(call, chunk, head, i + 1, strip.next);
      } else if (head + 1 < item.last) {
        next_count = find_tiles(call, chunk, head + 1, 0, strip.next);
      } else if (next) {
        find_tiles(next->call, next->item.chunk, next->item.head, 0, strip.next);
      }
      if (strip.begin > 0 || strip.end < strip.count * kTileTokens) {
        clean.replace(call, strip);
      }
      call.kernel.attend(state, strip);
      if ((i + 1) % part_strips == 0 || i + 1 == strips) {
        keep(call, chunk, state, head, chunk.index + i / part_strips, folded);
      }
    }
  }
  if (call.kernel.release != nullptr) {
    call.kernel.release();
  }
}

}  // namespace

void run_item(const Work& work, const std::optional<Work>& next) {
  const Call& call = work.call;
  const Item& item = work.item;
  attend_item(call, item, next);
  const ChunkPlan& chunk = item.chunk;
  if (chunk.partial < 0) {
    return;
  }
  std::atomic<int32_t>& arrived = call.arrivals[chunk.partial * call.plan.ranges + item.range];
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == chunk.count) {
    for (int32_t query_head = item.head * call.group(); query_head < item.last * call.group(); ++query_head) {
      merge(call, chunk, query_head);
    }
  }
}

}  // namespace neo
