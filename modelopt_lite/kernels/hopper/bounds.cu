// Which key blocks skip-softmax keeps, from products of queries and keys in INT8, and exactly where these do not say: for
// bounds.py.
//
// A program of bound_blocks takes one query block of HEADS heads that share keys: one warp loads, and each warpgroup
// multiplies the queries of a head with one key block after the other, on the matrix units. The products differ from the
// true ones by less than a bound, which depends on the query and the block. So a warp knows of its 16 queries whether
// some score surely reaches what it has to reach, or none does, or neither is sure. Two bits a block say so. The first 64
// queries come first. If one of them surely reaches it, the block is kept, and the others are not multiplied.
//
// Blocks lie in memory as the matrix units read them: [16 bytes of a row, row, byte].
//
// A program of decide_open takes one key block, and multiplies its keys with those 16 queries each that are not sure.

typedef unsigned int u32;
typedef unsigned long long u64;

struct Problem {
  const signed char* queries;  // [heads, query blocks, 8, 128, 16]
  const signed char* keys;     // [kv heads, batch * columns, 8, 128, 16]
  const float4* rows;          // [heads, query blocks, 128]: what to reach, norm, norm of the error, in steps of the query
  const float4* tiles;         // [kv heads, batch * columns]: 1, norm of the errors, norm of the keys, in steps of the block
  const int* spans;            // [query blocks, 4]: sequence, first column, the one behind the last, row of the first query
  u32* words;                  // [heads, query blocks, words, 3, 4]: four warps' bits of sure blocks, eight of open ones
  int query_blocks, columns, key_blocks, words_each, heads_per_kv;
};

static_assert(sizeof(Problem) == 72, "");

struct OpenProblem {
  const unsigned short *queries, *keys;  // BF16 or FP16
  const float4* rows;                    // the last number: what a product has to reach
  const int* spans;
  const u32* words;
  unsigned char* kept;         // [heads, query blocks, columns]
  const int* starts;           // [batch]: first query block of a sequence
  const long long* key_rows;   // [batch]: row of its first key
  long long query_stride, query_head_stride, key_stride, key_head_stride;  // of elements
  int batch, query_blocks, columns, words_each, heads_per_kv, num_sinks;
};
static_assert(sizeof(OpenProblem) == 120, "");

constexpr int TILE = 128, HALVES = 2, STAGES = HEADS == 1 ? 2 : 4;
constexpr u32 TILE_BYTES = TILE * 128, ALL = 0xFFFFFFFF;
#define NONE __uint_as_float(0xFF800000)  // -inf
#ifdef FP16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
constexpr u32 ROW_BYTES = TILE * 16, KEYS = HEADS * TILE_BYTES, ROWS = KEYS + STAGES * TILE_BYTES;
constexpr u32 TILES = ROWS + HEADS * ROW_BYTES, FULL = TILES + 16 * STAGES, FREE = FULL + 8 * STAGES;
constexpr u32 QUERIES_FULL = FREE + 8 * STAGES;

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}\n" ::
          "r"(barrier), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ float4 read_shared(u32 at) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at) : "memory");
  return x;
}

// What wgmma takes for rows in shared memory: 8 rows of 16 bytes follow each other, then the next 8, then the next bytes.
__device__ __forceinline__ u64 matrix(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(TILE * 16 >> 4) << 16 | (u64)(8 * 16 >> 4) << 32;
}

#define FOUR(x, i) "=r"(x[i]), "=r"(x[(i) + 1]), "=r"(x[(i) + 2]), "=r"(x[(i) + 3])
#define SIXTEEN(x, i) FOUR(x, i), FOUR(x, (i) + 4), FOUR(x, (i) + 8), FOUR(x, (i) + 12)
#define SIXTY_FOUR(x) SIXTEEN(x, 0), SIXTEEN(x, 16), SIXTEEN(x, 32), SIXTEEN(x, 48)
#define PRODUCT(a, b, accumulate)                                                                                      \
  "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "    \
  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "     \
  "%58, %59, %60, %61, %62, %63}, " a ", " b ", " accumulate ";\n"

// products = queries * keys, [64, 128] * [128, 128]
__device__ __forceinline__ void multiply(int (&products)[64], u64 q, u64 k) {
  constexpr u32 STEP = 2 * TILE * 16 >> 4;
  asm volatile(
      "{\n.reg .pred no, yes;\nsetp.ne.b32 no, 0, 0;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      PRODUCT("%64", "%68", "no") PRODUCT("%65", "%69", "yes") PRODUCT("%66", "%70", "yes") PRODUCT("%67", "%71", "yes")
      "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n}\n"
      : SIXTY_FOUR(products)
      : "l"(q), "l"(q + STEP), "l"(q + 2 * STEP), "l"(q + 3 * STEP), "l"(k), "l"(k + STEP), "l"(k + 2 * STEP),
        "l"(k + 3 * STEP)
      : "memory");
}

// The largest of a thread's 32 products of one of its two rows.
__device__ __forceinline__ int largest(const int (&products)[64], int row) {
  int found[4];
#pragma unroll
  for (int part = 0; part < 4; part++) {
    const int at = 16 * part + 2 * row;
    found[part] = max(products[at], products[at + 1]);
#pragma unroll
    for (int i = 4; i < 16; i += 4) found[part] = __vimax3_s32(found[part], products[at + i], products[at + i + 1]);
  }
  return max(__vimax3_s32(found[0], found[1], found[2]), found[3]);
}

// Whether a condition holds for any thread of a warpgroup, which all arrive here.
__device__ __forceinline__ bool any_of_group(int group, bool condition) {
  u32 found;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 q, %1, 0;\nbar.red.or.pred p, %2, 128, q;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(found)
      : "r"((u32)condition), "r"(group + 1)
      : "memory");
  return found;
}

extern "C" __global__ void __launch_bounds__(128 * HEADS + 32, 4 / HEADS) bound_blocks(const Problem p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const u32 base = (u32)__cvta_generic_to_shared(memory);
  const int slices = p.heads_per_kv / HEADS, rest = blockIdx.x / slices;
  const int block = p.query_blocks - 1 - rest % p.query_blocks, kv_head = rest / p.query_blocks;
  const int head = kv_head * p.heads_per_kv + blockIdx.x % slices * HEADS;
  const int first = p.spans[4 * block + 1], behind = p.spans[4 * block + 2];
  if (first >= behind) return;
  const long long first_tile = (long long)kv_head * p.key_blocks + p.spans[4 * block] * p.columns;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(base + FULL + 8 * stage, 1);
      barrier_init(base + FREE + 8 * stage, 4 * HEADS);
    }
    barrier_init(base + QUERIES_FULL, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const int group = threadIdx.x / 128;
  if (group == HEADS) {
    if (threadIdx.x % 32 != 0) return;
    barrier_expect(base + QUERIES_FULL, HEADS * (TILE_BYTES + ROW_BYTES));
    for (int i = 0; i < HEADS; i++) {
      const long long of_rows = (long long)(head + i) * p.query_blocks + block;
      load(base + i * TILE_BYTES, p.queries + of_rows * TILE_BYTES, TILE_BYTES, base + QUERIES_FULL);
      load(base + ROWS + i * ROW_BYTES, p.rows + of_rows * TILE, ROW_BYTES, base + QUERIES_FULL);
    }
    for (int column = first, step = 0; column < behind; column++, step++) {
      const u32 stage = step % STAGES;
      barrier_wait(base + FREE + 8 * stage, (step / STAGES & 1) ^ 1);
      barrier_expect(base + FULL + 8 * stage, TILE_BYTES + 16);
      const void* from = p.keys + (first_tile + column) * TILE_BYTES;
      load(base + KEYS + stage * TILE_BYTES, from, TILE_BYTES, base + FULL + 8 * stage);
      load(base + TILES + stage * 16, p.tiles + first_tile + column, 16, base + FULL + 8 * stage);
    }
    return;
  }

  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const u32 rows = base + ROWS + group * ROW_BYTES + (16 * warp + lane / 4) * 16;
  u32* words = p.words + ((long long)(head + group) * p.query_blocks + block) * p.words_each * 12 + warp;
  const u64 query = matrix(base + group * TILE_BYTES);
  u32 sure = 0, open[HALVES] = {0, 0};
  barrier_wait(base + QUERIES_FULL, 0);
#pragma unroll 1
  for (int column = first, step = 0; column < behind; column++, step++) {
    const u32 stage = step % STAGES, bit = 1u << (column & 31);
    barrier_wait(base + FULL + 8 * stage, step / STAGES & 1);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      int products[64];
      multiply(products, query + (half * 64 * 16 >> 4), matrix(base + KEYS + stage * TILE_BYTES));
      const float4 tile = read_shared(base + TILES + stage * 16);
      bool reaches = false, may_reach = false;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float4 of_row = read_shared(rows + (64 * half + 8 * r) * 16);
        const float found = (float)largest(products, r);
        const float bound = of_row.x * tile.x, error = of_row.y * tile.y + of_row.z * tile.z;
        reaches |= found >= bound + error;
        may_reach |= !(found < bound - error);  // also if it is NaN
      }
      if (__any_sync(ALL, may_reach)) open[half] |= bit;
      if (half == 0 ? any_of_group(group, reaches) : __any_sync(ALL, reaches)) {
        sure |= bit;
        break;
      }
    }
    if (lane == 0) barrier_arrive(base + FREE + 8 * stage);
    if ((column & 31) == 31 || column + 1 == behind) {
      if (lane == 0) {
        u32* to = words + column / 32 * 12;
        to[0] = sure;
        to[4] = open[0];
        to[8] = open[1];
      }
      sure = open[0] = open[1] = 0;
    }
  }
}

// One step of a product of 16 queries with 8 keys. Lane t of a quad has dimensions 8t to 8t + 7 of 32 of each row.
__device__ __forceinline__ void multiply_add(float (&sum)[4], u32 a, u32 b, u32 c, u32 d, u32 e, u32 f) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "r"(f));
}

// Keys lie so far apart that eight threads do not read from the same banks.
constexpr int OPEN_THREADS = 256, KEY_BYTES = 256 + 64, LIST = TILE * KEY_BYTES;

extern "C" __global__ void __launch_bounds__(OPEN_THREADS, 2) decide_open(const OpenProblem p) {
  extern __shared__ __align__(128) unsigned char memory[];
  int* list = (int*)(memory + LIST);  // of pairs of query block and head, eight times, plus the warp
  int& count = list[8 * OPEN_THREADS];
  const int column = blockIdx.x % p.columns, rest = blockIdx.x / p.columns;
  const int sequence = rest % p.batch, kv_head = rest / p.batch;
  const int begin = p.starts[sequence], end = sequence + 1 < p.batch ? p.starts[sequence + 1] : p.query_blocks;
  const int pairs = (end - begin) * p.heads_per_kv, word = column / 32, bit = column % 32;
  const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  bool loaded = false;
  for (int first = 0; first < pairs; first += OPEN_THREADS) {
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int pair = first + threadIdx.x, block = begin + pair / p.heads_per_kv;
    if (pair < pairs && p.spans[4 * block + 1] <= column && column < p.spans[4 * block + 2]) {
      const long long of_rows = (long long)(kv_head * p.heads_per_kv + pair % p.heads_per_kv) * p.query_blocks + block;
      const uint4* words = (const uint4*)(p.words + (of_rows * p.words_each + word) * 12);
      const uint4 a = words[0], b = words[1], c = words[2];
      const bool sure = (a.x | a.y | a.z | a.w) >> bit & 1;
      p.kept[of_rows * p.columns + column] = sure;
      if (!sure) {
        const u32 open[8] = {b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (open[i] >> bit & 1) list[atomicAdd(&count, 1)] = 8 * pair + i;
      }
    }
    __syncthreads();
    const int items = count;
    if (items > 0 && !loaded) {
      const unsigned short* keys = p.keys + kv_head * p.key_head_stride;
      const long long row = p.key_rows[sequence] + column * TILE;
      for (int i = threadIdx.x; i < TILE * 16; i += OPEN_THREADS) {
        // In place of sinks, which are no others, stands the last key.
        const int key = column * TILE + i / 16 < p.num_sinks ? TILE - 1 : i / 16;
        const unsigned short* from = keys + (row + key) * p.key_stride + i % 16 * 8;
        *(uint4*)(memory + i / 16 * KEY_BYTES + i % 16 * 16) = *(const uint4*)from;
      }
      loaded = true;
      __syncthreads();
    }
    for (int item = warp; item < items; item += OPEN_THREADS / 32) {
      const int pair = list[item] / 8, part = list[item] % 8, block = begin + pair / p.heads_per_kv;
      const int head = kv_head * p.heads_per_kv + pair % p.heads_per_kv;
      const long long of_rows = (long long)head * p.query_blocks + block;
      uint4 query[2][4];
      float least[2], largest[2] = {NONE, NONE};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = 16 * part + quad + 8 * r;
        least[r] = p.rows[of_rows * TILE + row].w;
        // Rows without a query have to reach infinity.
        const bool exists = least[r] < -NONE;
        const int at = exists ? p.spans[4 * block + 3] + row : 0;
        const uint4* from = (const uint4*)(p.queries + head * p.query_head_stride + at * p.query_stride);
#pragma unroll
        for (int i = 0; i < 4; i++) query[r][i] = exists ? from[4 * i + lane] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll 1
      for (int n = 0; n < TILE; n += 32) {
        const uint4* key = (const uint4*)(memory + (n + quad) * KEY_BYTES) + lane;
        float sum[4][4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) {  // products that do not wait for each other
            const uint4 k = key[8 * KEY_BYTES / 16 * j + 4 * i];
            multiply_add(sum[j], query[0][i].x, query[1][i].x, query[0][i].y, query[1][i].y, k.x, k.y);
            multiply_add(sum[j], query[0][i].z, query[1][i].z, query[0][i].w, query[1][i].w, k.z, k.w);
          }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          largest[0] = fmaxf(largest[0], fmaxf(sum[j][0], sum[j][1]));
          largest[1] = fmaxf(largest[1], fmaxf(sum[j][2], sum[j][3]));
        }
      }
      if (largest[0] >= least[0] || largest[1] >= least[1]) p.kept[of_rows * p.columns + column] = 1;
    }
    __syncthreads();
  }
}
