// Attention that keeps the two largest of every four scores, on Hopper's sparse tensor cores: for sparse_cores.py.
//
// As in hopper.py, persistent programs take items, 64 queries of one head for each warpgroup that computes, longest first;
// one thread finds them, one loads; masked tiles come first, and their row maximum stays the reference of the others.
// What differs: of a group of four only the two weights that are kept are computed, and multiplied with the values by
// wgmma.sp, which takes them compressed, with four bits a group that say which two they are.
//
// A thread has to own whole groups. Key 16s + 4t + 2p + e of a tile (s < 8, t < 4, p < 2, e < 2) lies in row
// 64p + 8s + 2t + e of it in shared memory, so that all scores of a group lie in lane t of a quad; values lie in their
// natural order. A dense tile of weights is the sum of two sparse ones, of places 0, 1 and of places 2, 3.
//
// The compiler is told DIM, the head dimension, 64 or 128; WARPGROUPS, how many compute, 2 or 3; and FP16 for that type, BF16
// being the default. Weights beyond FP16 become infinite, and so does the output: then the item is computed again.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct Problem {
  const void *starts_q, *lengths_q, *starts_k, *lengths_k;  // [batch]
  unsigned short* out;                                       // BF16 or FP16
  float* lse;                                                // [tokens, heads], or null
  int* counter;
  const int *visits, *order;  // as visits_launch.py has them, or null: all tiles are visited
  long long out_token_stride, out_head_stride;               // of elements, like all strides
  int query_head_stride, key_head_stride, value_head_stride;
  int wide;  // bit i: the i-th of the first four pointers is to 64-bit integers
  int batch, heads, heads_per_kv, tiles_per_head, heads_per_wave, key_rows, tail_start;
  int num_sinks, window, causal, sparse_decode;
  int list_rows, visits_stride, heads_per_list;
  float scale;      // to log2 space
  float no_factor;  // 0, which the compiler is not to know
};

constexpr int TILE = 128, ROWS = 64, ITEM_ROWS = ROWS * WARPGROUPS, COMPUTE_THREADS = 128 * WARPGROUPS;
constexpr int STAGES = 256 / DIM, SLOTS = 2, PARTS = DIM / 64;
constexpr bool MAY_BE_LISTED = ITEM_ROWS == 128;  // visits.py has lists for so many queries
constexpr u32 BOX = 2 * ROWS * 64;  // bytes of 64 rows of 64 elements, a part of what is that long
constexpr u32 TILE_BYTES = 2 * TILE * DIM, QUERY_BYTES = 2 * ROWS * DIM, ITEM_QUERY_BYTES = WARPGROUPS * QUERY_BYTES;
constexpr u32 FIRST_TWO = 0x44444444, LAST_TWO = 0xEEEEEEEE;  // metadata: places 0, 1 and places 2, 3 of every group
constexpr u32 ALL = 0xFFFFFFFF;
#ifdef FP16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
#define NONE __uint_as_float(0xFF800000)  // -inf
constexpr float LARGEST = 8.5e37f;  // 2^126: the approximate inverse of larger sums is 0

// Shared memory, from a multiple of 1024 on; sparse_cores.py asks for SHARED bytes and 1023 more.
constexpr u32 QUERIES = 0, KEYS = SLOTS * ITEM_QUERY_BYTES, VALUES = KEYS + STAGES * TILE_BYTES;
constexpr u32 LOADED = VALUES + STAGES * TILE_BYTES, KEYS_FREE = LOADED + 8 * STAGES, VALUES_FREE = KEYS_FREE + 8 * STAGES;
constexpr u32 FOUND = VALUES_FREE + 8 * STAGES, POSTED = FOUND + 8 * SLOTS, DONE = POSTED + 8 * SLOTS;
constexpr u32 ITEM_BYTES = 96;
constexpr u32 ITEMS = DONE + 8 * SLOTS, OVERFLOWS = ITEMS + ITEM_BYTES * SLOTS, SHARED = OVERFLOWS + 16 * WARPGROUPS * SLOTS;
static_assert(SHARED <= KEYS + 2 * STAGES * TILE_BYTES + 512, "");
static_assert(sizeof(Problem) == 168, "");
constexpr int HEADER = 5, UNLISTED = 1;  // of visits.py

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}\n" ::
          "r"(barrier), "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier, bool elected) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(barrier),
      "r"((u32)elected)
      : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void synchronize(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ int read_shared(u32 at) {
  int number;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(number) : "r"(at) : "memory");
  return number;
}
__device__ __forceinline__ void write_shared(u32 at, int number) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(number) : "memory");
}
__device__ __forceinline__ void load_box(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 rounded(float low, float high) {
  u32 pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What wgmma takes for a matrix in shared memory, swizzled by 128 bytes.
__device__ __forceinline__ u64 matrix(u32 address, u32 leading_bytes, u32 stride_bytes) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(stride_bytes >> 4) << 32 | 1ull << 62;
}

#define FOUR(kind, x, i) kind(x[i]), kind(x[(i) + 1]), kind(x[(i) + 2]), kind(x[(i) + 3])
#define SIXTEEN(kind, x, i) FOUR(kind, x, i), FOUR(kind, x, (i) + 4), FOUR(kind, x, (i) + 8), FOUR(kind, x, (i) + 12)
#define THIRTY_TWO(kind, x, i) SIXTEEN(kind, x, i), SIXTEEN(kind, x, (i) + 16)
#define SIXTY_FOUR(kind, x) THIRTY_TWO(kind, x, 0), THIRTY_TWO(kind, x, 32)
#define REGISTERS_32                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                                                   \
  REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
               "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DENSE(a, b, accumulate)                                                                                     \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" REGISTERS_64 "}, " a ", " b ", " accumulate ", " \
  "1, 1, 0, 0;\n"
#define SPARSE(n, output, a, b, metadata, selector)                                                          \
  "wgmma.mma_async.sp.sync.aligned.m64n" n "k32.f32." TYPE "." TYPE " {" output "}, " a ", " b ", " metadata \
  ", " selector ", yes, 1, 1, 1;\n"
#define SPARSE_64(...) SPARSE("64", REGISTERS_32, __VA_ARGS__)
#define SPARSE_128(...) SPARSE("128", REGISTERS_64, __VA_ARGS__)

// Products are issued in one assembly statement each, so that the compiler sees no registers in use in between.

// scores = queries * keys, [64, DIM] * [DIM, 128]
__device__ __forceinline__ void multiply_keys(float (&scores)[64], u64 q, u64 k) {
#if DIM == 64
  asm volatile(
      "{\n.reg .pred no, yes;\nsetp.ne.b32 no, 0, 0;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      DENSE("%64", "%68", "no") DENSE("%65", "%69", "yes") DENSE("%66", "%70", "yes") DENSE("%67", "%71", "yes")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : SIXTY_FOUR("=f", scores)
      : "l"(q), "l"(q + 2), "l"(q + 4), "l"(q + 6), "l"(k), "l"(k + 2), "l"(k + 4), "l"(k + 6)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred no, yes;\nsetp.ne.b32 no, 0, 0;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      DENSE("%64", "%72", "no") DENSE("%65", "%73", "yes") DENSE("%66", "%74", "yes") DENSE("%67", "%75", "yes")
      DENSE("%68", "%76", "yes") DENSE("%69", "%77", "yes") DENSE("%70", "%78", "yes") DENSE("%71", "%79", "yes")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : SIXTY_FOUR("=f", scores)
      : "l"(q), "l"(q + 2), "l"(q + 4), "l"(q + 6), "l"(q + 512), "l"(q + 514), "l"(q + 516), "l"(q + 518), "l"(k),
        "l"(k + 2), "l"(k + 4), "l"(k + 6), "l"(k + 1024), "l"(k + 1026), "l"(k + 1028), "l"(k + 1030)
      : "memory");
#endif
}

// output += weights * values, [64, 128] * [128, DIM], of weights compressed to [64, 64]
__device__ __forceinline__ void multiply_values(
    float (&output)[DIM / 2], const u32 (&weights)[16], const u32 (&which)[2], u64 v) {
#if DIM == 64
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      SPARSE_64("{%32, %33, %34, %35}", "%48", "%52", "0") SPARSE_64("{%36, %37, %38, %39}", "%49", "%52", "1")
      SPARSE_64("{%40, %41, %42, %43}", "%50", "%53", "0") SPARSE_64("{%44, %45, %46, %47}", "%51", "%53", "1")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : THIRTY_TWO("+f", output, 0)
      : SIXTEEN("r", weights, 0), "l"(v), "l"(v + 256), "l"(v + 512), "l"(v + 768), "r"(which[0]), "r"(which[1])
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      SPARSE_128("{%64, %65, %66, %67}", "%80", "%84", "0") SPARSE_128("{%68, %69, %70, %71}", "%81", "%84", "1")
      SPARSE_128("{%72, %73, %74, %75}", "%82", "%85", "0") SPARSE_128("{%76, %77, %78, %79}", "%83", "%85", "1")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : SIXTY_FOUR("+f", output)
      : SIXTEEN("r", weights, 0), "l"(v), "l"(v + 256), "l"(v + 512), "l"(v + 768), "r"(which[0]), "r"(which[1])
      : "memory");
#endif
}

// The same with dense weights: those of places 0, 1 of all groups, and those of places 2, 3.
__device__ __forceinline__ void multiply_values(
    float (&output)[DIM / 2], const u32 (&first)[16], const u32 (&last)[16], u32 first_two, u32 last_two, u64 v) {
#if DIM == 64
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      SPARSE_64("{%32, %33, %34, %35}", "%64", "%68", "0") SPARSE_64("{%48, %49, %50, %51}", "%64", "%69", "0")
      SPARSE_64("{%36, %37, %38, %39}", "%65", "%68", "0") SPARSE_64("{%52, %53, %54, %55}", "%65", "%69", "0")
      SPARSE_64("{%40, %41, %42, %43}", "%66", "%68", "0") SPARSE_64("{%56, %57, %58, %59}", "%66", "%69", "0")
      SPARSE_64("{%44, %45, %46, %47}", "%67", "%68", "0") SPARSE_64("{%60, %61, %62, %63}", "%67", "%69", "0")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : THIRTY_TWO("+f", output, 0)
      : SIXTEEN("r", first, 0), SIXTEEN("r", last, 0), "l"(v), "l"(v + 256), "l"(v + 512), "l"(v + 768), "r"(first_two),
        "r"(last_two)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, 1, 0;\nwgmma.fence.sync.aligned;\n"
      SPARSE_128("{%64, %65, %66, %67}", "%96", "%100", "0") SPARSE_128("{%80, %81, %82, %83}", "%96", "%101", "0")
      SPARSE_128("{%68, %69, %70, %71}", "%97", "%100", "0") SPARSE_128("{%84, %85, %86, %87}", "%97", "%101", "0")
      SPARSE_128("{%72, %73, %74, %75}", "%98", "%100", "0") SPARSE_128("{%88, %89, %90, %91}", "%98", "%101", "0")
      SPARSE_128("{%76, %77, %78, %79}", "%99", "%100", "0") SPARSE_128("{%92, %93, %94, %95}", "%99", "%101", "0")
      "wgmma.commit_group.sync.aligned;\n}\n"
      : SIXTY_FOUR("+f", output)
      : SIXTEEN("r", first, 0), SIXTEEN("r", last, 0), "l"(v), "l"(v + 256), "l"(v + 512), "l"(v + 768), "r"(first_two),
        "r"(last_two)
      : "memory");
#endif
}

// Wait until all but BEHIND of the products issued are done, which the tile depends on.
template <int BEHIND>
__device__ __forceinline__ void wait_for(float (&tile)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : SIXTY_FOUR("+f", tile) : "n"(BEHIND) : "memory");
}
template <int BEHIND>
__device__ __forceinline__ void wait_for(float (&tile)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : THIRTY_TWO("+f", tile, 0) : "n"(BEHIND) : "memory");
}

// Here ends the use of registers that products read: the compiler may not use them for something else before.
__device__ __forceinline__ void release(u32 (&weights)[16]) { asm volatile("" : SIXTEEN("+r", weights, 0)::"memory"); }

// Stores that never happen, as sums are not negative: without them, the assembler lets the wait for the product of
// weights and values come before the softmax that is to run beside it, and rounds weights after that wait.
__device__ __forceinline__ void pin(const float (&sum)[2], const u32 (&weights)[16], const u32 (&which)[2]) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 a;\nmov.b32 a, 0;\nsetp.lt.f32 p, %16, 0fBF800000;\nsetp.lt.or.f32 p, %17, 0fBF800000, p;\n"
      "@p st.volatile.shared.v4.b32 [a], {%0, %1, %2, %3};\n@p st.volatile.shared.v4.b32 [a], {%4, %5, %6, %7};\n"
      "@p st.volatile.shared.v4.b32 [a], {%8, %9, %10, %11};\n@p st.volatile.shared.v4.b32 [a], {%12, %13, %14, %15};\n"
      "@p st.volatile.shared.v2.b32 [a], {%18, %19};\n}\n" ::SIXTEEN("r", weights, 0),
      "f"(sum[0]), "f"(sum[1]), "r"(which[0]), "r"(which[1])
      : "memory");
}

// What a thread is, and the factors that depend on it.
struct Thread {
  int warpgroup, index, warp, quad, lane;  // index: in the warpgroup; quad: in the warp; lane: in the quad
  bool odd, high, elected;
  u32 mine, others;      // factors of its own nibbles and of its neighbour's
  u32 select0, select1;  // bytes of both words of metadata
  float scale, no_factor;
};

// Log2 weights of the two kept scores of a group, in order of place, and which they are, as a number from -4 to 6 that
// is 8 less than the four bits: 4 for places 0, 1; 14 for places 2, 3; else 8 + (b > a) + 4 * (d > c).
//
// Exact, equal scores going to the lower place. Eight instructions of the ALU pipe, which is the narrow one beside
// products; choices are made by predicated FMAs. The last ones multiply by 0, or they would become selections.
__device__ __forceinline__ void choose(
    float a, float b, float c, float d, const Thread& thread, float shift, float& first, float& second, float& which) {
  asm("{\n.reg .pred p, q;\n.reg .f32 more, less, more2, less2, second, last;\n"
      "max.f32 more, %3, %4;\nmin.f32 less, %3, %4;\nmax.f32 more2, %5, %6;\nmin.f32 less2, %5, %6;\n"
      "setp.ge.f32 p, less, more2;\nsetp.gt.f32 q, less2, more;\n"
      "set.lt.f32.f32 second, %3, %4;\nset.lt.f32.f32 last, %5, %6;\n"
      "fma.rn.ftz.f32 %0, more, %7, %8;\n@p fma.rn.ftz.f32 %0, %3, %7, %8;\n@q fma.rn.ftz.f32 %0, %5, %7, %8;\n"
      "fma.rn.ftz.f32 %1, more2, %7, %8;\n@p fma.rn.ftz.f32 %1, %4, %7, %8;\n@q fma.rn.ftz.f32 %1, %6, %7, %8;\n"
      "fma.rn.ftz.f32 %2, last, 0f40800000, second;\n@p fma.rn.ftz.f32 %2, %9, second, 0fC0800000;\n"
      "@q fma.rn.ftz.f32 %2, %9, last, 0f40C00000;\n}\n"
      : "=&f"(first), "=&f"(second), "=&f"(which)
      : "f"(a), "f"(b), "f"(c), "f"(d), "f"(thread.scale), "f"(shift), "f"(thread.no_factor));
}

// Turn scores of a tile that is not masked into compressed weights and metadata.
//
// Metadata of 32 keys come from two lanes of a quad: bits 4c to 4c + 3 of lane 2s + h are those of group 4h + c of the
// lower row, 16 higher the upper row's, s being the selector. Each thread has four bits of each such word, and words
// are brought together in two exchanges, as bytes of two steps.
__device__ __forceinline__ void update_softmax(
    const float (&scores)[64], const Thread& thread, const float (&shift)[2], float (&sum)[2], u32 (&weights)[16], u32 (&which)[2]) {
  u32 bits[4][2];
#pragma unroll
  for (int step = 0; step < 4; step++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float places[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int at = 8 * step + 4 * half + 2 * r;
        float first, second;
        choose(scores[at], scores[at + 1], scores[at + 32], scores[at + 33], thread, shift[r], first, second, places[r]);
        first = exp2_of(first);
        second = exp2_of(second);
        sum[r] += first + second;
        weights[4 * step + 2 * half + r] = rounded(first, second);
      }
      // 2^23, whose bits are 0x4B000000, plus both rows' four bits
      bits[step][half] = __float_as_uint(__fmaf_rn(places[1], 65536.0f, places[0]) + (8388608.0f + 8 * 65537.0f));
    }
  u32 bytes[2];
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const u32 left = bits[step + 2][0] * 256 + bits[step][0], right = bits[step + 2][1] * 256 + bits[step][1];
    const u32 kept = thread.odd ? right : left, sent = thread.odd ? left : right;
    const u32 found = __shfl_xor_sync(ALL, sent, 1);
    bytes[step] = found * thread.others + (kept * thread.mine - 17 * 0x4B000000u);
  }
  const u32 kept = thread.high ? bytes[1] : bytes[0], sent = thread.high ? bytes[0] : bytes[1];
  const u32 found = __shfl_xor_sync(ALL, sent, 2);
  which[0] = __byte_perm(kept, found, thread.select0);
  which[1] = __byte_perm(kept, found, thread.select1);
}

// Which of a thread's 32 keys of a masked tile its two rows see, and which are exempt: bits 4 * group + place.
struct Masks {
  u32 visible[2], exempt[2];
};

// The keys at a distance below x from the first one that a thread holds of a tile, as such bits.
__device__ __forceinline__ u32 keys_before(int x) {
  const int inside = min(max(x, 0), TILE);
  u32 bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(inside / 16 * 4 + min(inside % 16, 4)));
  return bits;
}

#define WEIGH(weight, score, larger, one, other, beyond, place)                                                     \
  "and.b32 bit, %8, " place ";\nsetp.ne.u32 kept, bit, 0;\nselp.f32 bound, " one ", " other ", " larger ";\n"         \
  "setp." beyond ".or.f32 kept, " score ", bound, kept;\nfma.rn.ftz.f32 " weight ", " score ", %9, %10;\n"           \
  "@!kept add.f32 " weight ", " weight ", %11;\nex2.approx.ftz.f32 " weight ", " weight ";\n"

// Weights of a group's scores: of the two that choose() would keep, and of those exempt by the lowest four bits. The larger
// of a pair is kept if it is beyond the smaller one of the other pair, and the smaller if it is beyond the larger.
__device__ __forceinline__ void weigh(
    float a, float b, float c, float d, u32 exempt, const Thread& thread, float shift, float (&weight)[4]) {
  asm("{\n.reg .pred p, q, kept;\n.reg .f32 more, less, more2, less2, bound;\n.reg .b32 bit;\n"
      "max.f32 more, %4, %5;\nmin.f32 less, %4, %5;\nmax.f32 more2, %6, %7;\nmin.f32 less2, %6, %7;\n"
      "setp.ge.f32 p, %4, %5;\nsetp.ge.f32 q, %6, %7;\n"
      WEIGH("%0", "%4", "p", "less2", "more2", "ge", "1") WEIGH("%1", "%5", "p", "more2", "less2", "ge", "2")
      WEIGH("%2", "%6", "q", "less", "more", "gt", "4") WEIGH("%3", "%7", "q", "more", "less", "gt", "8") "}\n"
      : "=&f"(weight[0]), "=&f"(weight[1]), "=&f"(weight[2]), "=&f"(weight[3])
      : "f"(a), "f"(b), "f"(c), "f"(d), "r"(exempt), "f"(thread.scale), "f"(shift), "f"(NONE));
}

// Turn scores of a masked tile into dense weights, those of places 0, 1 and of places 2, 3, with the online softmax.
__device__ __forceinline__ void update_softmax_masked(
    float (&scores)[64], const Thread& thread, const Masks& masks, float (&top)[2], float (&shift)[2],
    float (&rescale)[2], float (&sum)[2], u32 (&first)[16], u32 (&last)[16]) {
  // No query of the first warpgroup sees anything of the upper half of a tile on the diagonal.
  const bool upper = __any_sync(ALL, (masks.visible[0] | masks.visible[1]) >> 16);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float largest = top[r];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half == 1 && !upper) break;
#pragma unroll
      for (int j = 0; j < 16; j++) {
        const int group = 4 * half + j / 4, place = j % 4;
        float& score = scores[place / 2 * 32 + 4 * group + 2 * r + place % 2];
        score = masks.visible[r] >> (4 * group + place) & 1 ? score : NONE;
        largest = fmaxf(largest, score);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
    shift[r] = largest == NONE ? 0.0f : -largest * thread.scale;  // nothing visible so far: any finite number does
    rescale[r] = exp2_of(__fmaf_rn(top[r], thread.scale, shift[r]));
    top[r] = largest;
    sum[r] *= rescale[r];
#pragma unroll
    for (int group = 0; group < 8; group++) first[2 * group + r] = last[2 * group + r] = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half == 1 && !upper) break;
#pragma unroll
      for (int group = 4 * half; group < 4 * half + 4; group++) {
        const int at = 4 * group + 2 * r;
        float weight[4];
        weigh(scores[at], scores[at + 1], scores[at + 32], scores[at + 33], masks.exempt[r] >> 4 * group, thread, shift[r],
              weight);
        sum[r] += (weight[0] + weight[1]) + (weight[2] + weight[3]);
        first[2 * group + r] = rounded(weight[0], weight[1]);
        last[2 * group + r] = rounded(weight[2], weight[3]);
      }
    }
  }
}

__device__ __forceinline__ int entry(const Problem& p, const void* numbers, int which, int index) {
  return p.wide >> which & 1 ? (int)((const long long*)numbers)[index] : ((const int*)numbers)[index];
}

// What there is to compute for ITEM_ROWS queries of one head, which they see in which tiles: masked ones first, the last keys,
// then what is before the hot tiles, then the band around the queries backwards; then the hot tiles. As in hopper.py.
struct Item {
  int number, head, first_row, start_k;                      // first_row: of the queries; start_k: row of the first key
  int before, rows;                                         // of these, how many come before the sequence and its end
  int first_position, length, window;                       // of the first query, the keys, and the dense window
  int hot_begin, band_begin, band_end, last, masked, tiles;  // tiles: 0 if there is nothing to do; twice, it is the end
  int spared[WARPGROUPS - 1];                                // masked ones, the last, that are not for later warpgroups
  int online;                                               // whether to use the ordinary online softmax
  const int* visits;                                        // its tiles, if they are listed
  // The first key of a tile, plus UNLISTED if it is not listed.
  __device__ __forceinline__ int tile(int index) const {
    if (MAY_BE_LISTED && visits != nullptr) return visits[index];
    const int before_hot = (index - 1) * TILE, hot = hot_begin + (index - masked) * TILE;
    if (index == 0) return last;
    if (index >= masked) return hot >= band_begin ? hot + band_end - band_begin : hot;
    return before_hot < hot_begin ? before_hot : band_end - TILE - (before_hot - hot_begin);
  }
};
static_assert(sizeof(Item) <= ITEM_BYTES, "");

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

// Find an item by its number. Items come in waves of heads whose keys and values fit into the L2 cache; in a wave, the
// longest tiles first. There may be no rows.
__device__ __forceinline__ Item find_item(int number, bool online, const Problem& p) {
  const int wave = number / (p.tiles_per_head * p.heads_per_wave);
  const int in_wave = number - wave * p.tiles_per_head * p.heads_per_wave;
  const int heads_in_wave = min(p.heads_per_wave, p.batch * p.heads - wave * p.heads_per_wave);
  const int head = wave * p.heads_per_wave + in_wave % heads_in_wave, sequence = head / p.heads;
  const int row_start = (p.tiles_per_head - 1 - in_wave / heads_in_wave) * ITEM_ROWS;
  const int query_length = entry(p, p.lengths_q, 1, sequence);
  Item item;
  item.number = number;
  item.online = online;
  item.head = head % p.heads;
  item.first_row = entry(p, p.starts_q, 0, sequence) + row_start;
  item.before = 0;
  item.rows = query_length - row_start;
  item.length = entry(p, p.lengths_k, 3, sequence);
  item.start_k = entry(p, p.starts_k, 2, sequence);
  item.visits = nullptr;
  item.first_position = item.length - item.rows;
  item.window = query_length == 1 && !p.sparse_decode ? item.length : p.window;
  const int last_position = item.first_position + min(ITEM_ROWS, item.rows) - 1;
  const int keys_end = p.causal ? last_position + 1 : item.length;
  const int full_end = max(min((keys_end + TILE - 1) / TILE, item.length / TILE), 0) * TILE;
  const int hot_begin = min((p.num_sinks + TILE - 1) / TILE * TILE, full_end);
  const int band_begin = clamp(max(item.first_position - max(item.window - 1, 0), 0) / TILE * TILE, hot_begin, full_end);
  const int band_end = p.causal ? full_end : clamp((last_position + TILE) / TILE * TILE, band_begin, full_end);
  item.last = max(keys_end - 1, 0) / TILE * TILE;
  item.hot_begin = online ? item.last : min(hot_begin, item.last);
  item.band_begin = clamp(band_begin, item.hot_begin, item.last);
  item.band_end = clamp(band_end, item.band_begin, item.last);
  item.masked = 1 + (item.hot_begin + item.band_end - item.band_begin) / TILE;
  // Of the band, which comes backwards, later queries need less.
#pragma unroll
  for (int after = 0; after < WARPGROUPS - 1; after++) {
    const int late_begin = max(item.first_position + ROWS * (after + 1) - max(item.window - 1, 0), 0) / TILE * TILE;
    item.spared[after] = (clamp(late_begin, item.band_begin, item.band_end) - item.band_begin) / TILE;
  }
  item.tiles = item.masked + (item.band_begin - item.hot_begin + item.last - item.band_end) / TILE;
  return item;
}

// The same with lists of key blocks.
__device__ __forceinline__ Item find_listed_item(int number, bool online, const Problem& p) {
  Item item = {};
  item.number = number;
  item.online = online;
  item.head = number / p.list_rows;
  const int row = number % p.list_rows;
  const int* visits = p.visits + ((long long)(item.head / p.heads_per_list) * p.list_rows + row) * p.visits_stride;
  const int sequence = visits[0], row_start = visits[1];
  item.tiles = visits[2];
  item.masked = online ? item.tiles : visits[3];
  item.spared[0] = online ? 0 : visits[4];
  item.visits = visits + HEADER;
  item.last = item.visits[0];
  const int query_length = entry(p, p.lengths_q, 1, sequence);
  item.first_row = entry(p, p.starts_q, 0, sequence) + row_start;
  item.before = max(-row_start, 0);
  item.rows = query_length - row_start;
  item.length = entry(p, p.lengths_k, 3, sequence);
  item.start_k = entry(p, p.starts_k, 2, sequence);
  item.first_position = item.length - item.rows;
  item.window = query_length == 1 && !p.sparse_decode ? item.length : p.window;
  return item;
}

// Find items, one ahead of what is computed, as that takes two or three accesses to memory: the part of one thread.
__device__ __forceinline__ void find_items(const Problem& p, unsigned char* memory, u32 base) {
  const bool listed = MAY_BE_LISTED && p.visits != nullptr;
  const int items = p.heads * (listed ? p.list_rows : p.batch * p.tiles_per_head);
  auto find = [&](int number, bool online) {
    return listed ? find_listed_item(number, online, p) : find_item(number, online, p);
  };
  int idle = 0;
  for (u32 post = 0; idle < 2; post++) {
    const u32 slot = post % SLOTS;
    barrier_wait(base + DONE + 8 * slot, (post / SLOTS & 1) ^ 1);
    int overflowed = 0;
    if (post >= SLOTS)
      for (int warp = 0; warp < 4 * WARPGROUPS; warp++)
        overflowed |= read_shared(base + OVERFLOWS + 16 * WARPGROUPS * slot + 4 * warp);
    Item& mail = *(Item*)(memory + ITEMS + ITEM_BYTES * slot);
    int tiles = 0;
    if (overflowed) {
      mail = find(mail.number, true);
      tiles = mail.tiles;
    }
    while (tiles == 0) {
      const int number = atomicAdd(p.counter, 1);
      if (number >= items) break;
      const Item item = find(listed ? p.order[number] : number, false);
      if (item.rows <= 0) continue;
      mail = item;
      tiles = item.tiles;
    }
    if (tiles == 0) mail.tiles = 0;
    barrier_arrive(base + FOUND + 8 * slot, true);
    idle = tiles == 0 ? idle + 1 : 0;
  }
}

// Load what items need: the part of one thread. A stage holds the keys of one tile and the values of the tile before.
__device__ __forceinline__ void load_items(
    const TensorMap& query_map, const TensorMap& key_map, const TensorMap& key_tail_map, const TensorMap& value_map,
    const Problem& p, const unsigned char* memory, u32 base) {
  u32 step = 0;
  int idle = 0;
  for (u32 post = 0; idle < 2; post++) {
    const u32 slot = post % SLOTS, posted = base + POSTED + 8 * slot;
    barrier_wait(base + FOUND + 8 * slot, post / SLOTS & 1);
    const Item item = *(const Item*)(memory + ITEMS + ITEM_BYTES * slot);
    idle = item.tiles == 0 ? idle + 1 : 0;
    if (item.tiles == 0) {
      barrier_arrive(posted, true);
      continue;
    }
    barrier_expect(posted, ITEM_QUERY_BYTES);
    for (int box = 0; box < WARPGROUPS * PARTS; box++)
      load_box(base + QUERIES + slot * ITEM_QUERY_BYTES + BOX * box, query_map,
               item.head * p.query_head_stride + 64 * (box % PARTS), item.first_row + ROWS * (box / PARTS), posted);
    const int kv_head = item.head / p.heads_per_kv;
    int row_before = 0;
    for (int index = 0; index <= item.tiles; index++, step++) {
      const u32 stage = step % STAGES, parity = (step / STAGES & 1) ^ 1, loaded = base + LOADED + 8 * stage;
      // A tile behind the sequence, of which nothing is seen, may hold any keys: those that are there.
      const int first_key = index < item.tiles ? item.tile(index) & -TILE : 0;
      const int row = item.start_k + (first_key < item.length ? first_key : 0);
      barrier_wait(base + KEYS_FREE + 8 * stage, parity);
      // With the first tile come no values: those who compute may be through with it before this wait, and with keys
      // already there it could miss a phase.
      if (index == 0) barrier_wait(base + VALUES_FREE + 8 * stage, parity);
      barrier_expect(loaded, (index < item.tiles ? TILE_BYTES : 0) + (index > 0 ? TILE_BYTES : 0));
      if (index < item.tiles) {
        // Boxes know no last row: what is not whole before the end of the keys is in a copy of their end.
        const bool in_tail = row + TILE > p.key_rows;
        const TensorMap* map = in_tail ? &key_tail_map : &key_map;
        const int column = kv_head * (in_tail ? DIM : p.key_head_stride), from = in_tail ? row - p.tail_start : row;
        for (int box = 0; box < 2 * PARTS; box++) {
          // Rows have several addresses in these maps: a sequence may begin anywhere.
          const int first = from + box % 2 * 2;
          asm volatile(
              "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
              "%5}], [%6];" ::"r"(base + KEYS + stage * TILE_BYTES + BOX * box), "l"(map), "r"(column + box / 2 * 64),
              "r"(first % 4), "r"(first / 4 % 4), "r"(first / 16), "r"(loaded)
              : "memory");
        }
      }
      if (index > 0) {
        barrier_wait(base + VALUES_FREE + 8 * stage, parity);
        for (int part = 0; part < PARTS; part++)
          load_box(base + VALUES + stage * TILE_BYTES + 2 * BOX * part, value_map, kv_head * p.value_head_stride + 64 * part,
                   row_before, loaded);
      }
      row_before = row;
    }
  }
}

// The stages as those who compute see them.
struct Ring {
  u32 base, step;
  __device__ __forceinline__ u32 stage() const { return step % STAGES; }
  __device__ __forceinline__ void wait() const { barrier_wait(base + LOADED + 8 * stage(), step / STAGES & 1); }
  __device__ __forceinline__ void free_keys(const Thread& thread) const {
    barrier_arrive(base + KEYS_FREE + 8 * stage(), thread.elected);
  }
  __device__ __forceinline__ void free_values(const Thread& thread) {
    barrier_arrive(base + VALUES_FREE + 8 * stage(), thread.elected);
    step++;
  }
  __device__ __forceinline__ u64 keys() const { return matrix(base + KEYS, 16, 1024) + (stage() * TILE_BYTES >> 4); }
  __device__ __forceinline__ u64 values() const {
    return matrix(base + VALUES, 2 * BOX, 1024) + (stage() * TILE_BYTES >> 4);
  }
};

// Clear the values that lie past the sequence, all warpgroups together: zero times what is there need not be zero.
__device__ __forceinline__ void clear_values(u32 values, int rows, const Thread& thread) {
  constexpr int IN_ROW = DIM / 2;  // threads, four bytes each
  const int index = 128 * thread.warpgroup + thread.index;
  for (int row = rows + index / IN_ROW; row < TILE; row += COMPUTE_THREADS / IN_ROW)
    write_shared(values + index % IN_ROW / 32 * 2 * BOX + row * 128 + index % 32 * 4, 0);
  fence_async();
  synchronize(1 + WARPGROUPS, COMPUTE_THREADS);
}

// Multiply queries with keys of a hot tile, weights with the values of the tile before, and take the softmax.
__device__ __forceinline__ void advance(
    Ring& ring, const Thread& thread, u64 query, float (&output)[DIM / 2], const float (&shift)[2], float (&sum)[2],
    u32 (&weights)[16], u32 (&which)[2], u32 (&next)[16], u32 (&next_which)[2]) {
  float scores[64];
  ring.wait();
  multiply_keys(scores, query, ring.keys());
  multiply_values(output, weights, which, ring.values());
  wait_for<1>(scores);
  ring.free_keys(thread);
  update_softmax(scores, thread, shift, sum, next, next_which);
  release(next);
  pin(sum, next, next_which);
  wait_for<0>(output);
  release(weights);
  asm volatile("" : "+r"(which[0]), "+r"(which[1])::"memory");
  ring.free_values(thread);
}

__device__ __forceinline__ void finish(
    Ring& ring, const Thread& thread, float (&output)[DIM / 2], u32 (&weights)[16], const u32 (&which)[2]) {
  ring.wait();
  multiply_values(output, weights, which, ring.values());
  ring.free_keys(thread);
  wait_for<0>(output);
  release(weights);
  ring.free_values(thread);
}

// Compute a warpgroup's queries of an item, and say whether the sums overflowed: the output is not valid then.
__device__ __forceinline__ bool attend_item(
    const Item& item, u32 query_at, Ring& ring, const Thread& thread, const Problem& p, u32 zero) {
  const int row = ROWS * thread.warpgroup + 16 * thread.warp + thread.quad;
  int masked = item.masked;
  if (thread.warpgroup == 1) masked -= item.spared[0];
  if (thread.warpgroup == 2) masked -= item.spared[WARPGROUPS - 2];
  // Alike in all threads of a warp, which the compiler cannot know of what comes from memory.
  masked = __shfl_sync(ALL, masked, 0);
  const int tiles = __shfl_sync(ALL, item.tiles, 0);
  const u64 query = matrix(query_at, 16, 1024);
  // In registers before a product is issued, as the compiler does not know that nothing is added.
  const u32 first_two = FIRST_TWO + zero, last_two = LAST_TWO + zero;
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; r++)  // what lies past the last row counts as the last one and is not stored
    position[r] = item.first_position + min(row + 8 * r, item.rows - 1) - 4 * thread.lane;
  auto masks_of = [&](int tile) {
    const int first_key = tile & -TILE;
    Masks masks;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int end = position[r] + 1 - first_key;  // of what is up to the query
      const u32 up_to_it = keys_before(end);
      masks.visible[r] = p.causal ? up_to_it : keys_before(item.length - 4 * thread.lane - first_key);
      masks.exempt[r] = up_to_it & ~keys_before(end - item.window);
      masks.exempt[r] |= keys_before(p.num_sinks - 4 * thread.lane - first_key);
      if (tile & UNLISTED) masks.visible[r] &= masks.exempt[r];
    }
    return masks;
  };

  float output[DIM / 2], sum[2] = {0, 0}, top[2] = {NONE, NONE}, shift[2], rescale[2];
  u32 first[16], last[16];
  auto finish_masked = [&] {
    wait_for<0>(output);
    release(first);
    release(last);
    ring.free_values(thread);
  };
#pragma unroll
  for (int i = 0; i < DIM / 2; i++) output[i] = 0;
  {
    float scores[64];
    ring.wait();
    multiply_keys(scores, query, ring.keys());
    const Masks masks = masks_of(item.last);
    wait_for<0>(scores);
    ring.free_keys(thread);
    ring.free_values(thread);
    update_softmax_masked(scores, thread, masks, top, shift, rescale, sum, first, last);
  }
  if ((item.last & -TILE) + TILE > item.length) {
    ring.wait();
    clear_values(ring.base + VALUES + ring.stage() * TILE_BYTES, item.length - (item.last & -TILE), thread);
  }
#pragma unroll 1
  for (int index = 1; index < masked; index++) {
    float scores[64];
    ring.wait();
    multiply_keys(scores, query, ring.keys());
    multiply_values(output, first, last, first_two, last_two, ring.values());
    const Masks masks = masks_of(item.tile(index));
    wait_for<1>(scores);
    ring.free_keys(thread);
    if (WARPGROUPS == 2) {
      u32 next_first[16], next_last[16];
      update_softmax_masked(scores, thread, masks, top, shift, rescale, sum, next_first, next_last);
      finish_masked();
      // Not by moves, which it would leave out: products of weights from two places it puts one after the other.
#pragma unroll
      for (int i = 0; i < 16; i++) {
        first[i] = next_first[i] + zero;
        last[i] = next_last[i] + zero;
      }
    } else {  // there are no registers for two sets of weights
      finish_masked();
      update_softmax_masked(scores, thread, masks, top, shift, rescale, sum, first, last);
    }
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) output[i] *= rescale[i / 2 % 2];
  }
  int hot = tiles - masked;
  const bool hot_tiles = hot > 0;
  if (hot == 0) {
    ring.wait();
    multiply_values(output, first, last, first_two, last_two, ring.values());
    ring.free_keys(thread);
    finish_masked();
  } else {
    // Weights of one tile are multiplied while those of the next are computed: in two sets of registers in turns.
    u32 even[16], odd[16], which_even[2], which_odd[2];
    {
      float scores[64];
      ring.wait();
      multiply_keys(scores, query, ring.keys());
      multiply_values(output, first, last, first_two, last_two, ring.values());
      wait_for<1>(scores);
      ring.free_keys(thread);
      if (WARPGROUPS == 2) {
        update_softmax(scores, thread, shift, sum, even, which_even);
        release(even);
        pin(sum, even, which_even);
        finish_masked();
      } else {
        finish_masked();
        update_softmax(scores, thread, shift, sum, even, which_even);
      }
    }
#pragma unroll 1
    while (true) {
      if (--hot == 0) {
        finish(ring, thread, output, even, which_even);
        break;
      }
      advance(ring, thread, query, output, shift, sum, even, which_even, odd, which_odd);
      if (--hot == 0) {
        finish(ring, thread, output, odd, which_odd);
        break;
      }
      advance(ring, thread, query, output, shift, sum, odd, which_odd, even, which_even);
    }
  }

  bool suspicious = false;
  float total[2], nothing[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < DIM / 2; i++) nothing[i % 4] = __fmaf_rn(output[i], 0.0f, nothing[i % 4]);  // or NaN, if not finite
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(ALL, sum[r], 1);
    sum[r] += __shfl_xor_sync(ALL, sum[r], 2);
    const bool sound = nothing[2 * r] + nothing[2 * r + 1] == 0 && sum[r] <= LARGEST;
    suspicious |= row + 8 * r >= item.before && row + 8 * r < item.rows && !sound;
    total[r] = sum[r] == 0 ? 0.0f : 1.0f / sum[r];
  }
  if (p.lse != nullptr && thread.lane == 0)
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (row + 8 * r >= item.before && row + 8 * r < item.rows)
        p.lse[(long long)(item.first_row + row + 8 * r) * p.heads + item.head] =
            (top[r] * thread.scale + __log2f(sum[r])) * 0.6931471805599453f;

  // Through shared memory, in the place of the queries, to be written in whole lines.
  synchronize(1 + thread.warpgroup, 128);
  const int in_warp = thread.index % 32, row_of_lane = 16 * thread.warp + in_warp % 16;
#pragma unroll
  for (int j = 0; j < DIM / 8; j += 2) {
    const u32 at = query_at + j / 8 * BOX + row_of_lane * 128 + ((j % 8 + in_warp / 16 ^ row_of_lane % 8) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(rounded(output[4 * j] * total[0], output[4 * j + 1] * total[0])),
                 "r"(rounded(output[4 * j + 2] * total[1], output[4 * j + 3] * total[1])),
                 "r"(rounded(output[4 * j + 4] * total[0], output[4 * j + 5] * total[0])),
                 "r"(rounded(output[4 * j + 6] * total[1], output[4 * j + 7] * total[1]))
                 : "memory");
  }
  __syncwarp();
  constexpr int IN_LINE = DIM / 8, LINES = 32 / IN_LINE;  // threads that take a line, and lines at a time
  const int chunk = in_warp % IN_LINE;
  u32 lines[DIM / 4];
#pragma unroll
  for (int i = 0; i < 16 / LINES; i++) {
    const int line = 16 * thread.warp + LINES * i + in_warp / IN_LINE;
    const u32 at = query_at + chunk / 8 * BOX + line * 128 + ((chunk % 8 ^ line % 8) << 4);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : FOUR("=r", lines, 4 * i) : "r"(at) : "memory");
  }
  fence_async();  // before the next queries are loaded there
  const int first_line = ROWS * thread.warpgroup + 16 * thread.warp + in_warp / IN_LINE;
  unsigned short* out = p.out + item.head * p.out_head_stride + (item.first_row + first_line) * p.out_token_stride;
#pragma unroll
  for (int i = 0; i < 16 / LINES; i++)
    if (first_line + LINES * i >= item.before && first_line + LINES * i < item.rows)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(out + LINES * i * p.out_token_stride + chunk * 8),
                   FOUR("r", lines, 4 * i)
                   : "memory");
  return !item.online && hot_tiles && suspicious;  // else there is no other way to compute it
}

// Compute the items that are posted: the part of a warpgroup.
__device__ __forceinline__ void attend_items(const Problem& p, const unsigned char* memory, u32 base, int warpgroup) {
  const int index = threadIdx.x % 128;
  Thread thread = {warpgroup, index, index / 32, index % 32 / 4, index % 4};
  thread.odd = index & 1;
  thread.high = index & 2;
  thread.elected = index % 32 == 0;
  thread.mine = thread.odd ? 16 : 1;
  thread.others = thread.odd ? 1 : 16;
  thread.select0 = thread.high ? 0x2604 : 0x6240;
  thread.select1 = thread.high ? 0x3715 : 0x7351;
  thread.scale = p.scale;
  // Kept in a register, as a number that all threads share would be moved to one for each group. Not for two warpgroups and
  // a head dimension of 64, where that comes out by itself and this would cost 64 moves in the hot loop.
  thread.no_factor = DIM == 64 && WARPGROUPS == 2 ? p.no_factor : p.no_factor * index;
  const u32 zero = p.no_factor != 0;
  Ring ring = {base, 0};
  int idle = 0;
  for (u32 post = 0; idle < 2; post++) {
    const u32 slot = post % SLOTS;
    barrier_wait(base + POSTED + 8 * slot, post / SLOTS & 1);
    const Item item = *(const Item*)(memory + ITEMS + ITEM_BYTES * slot);
    bool overflowed = false;
    if (item.tiles > 0)
      overflowed = attend_item(item, base + QUERIES + slot * ITEM_QUERY_BYTES + warpgroup * QUERY_BYTES, ring, thread, p, zero);
    idle = item.tiles == 0 ? idle + 1 : 0;
    __syncwarp();  // a vote orders no memory
    overflowed = __any_sync(ALL, overflowed);
    if (thread.elected) write_shared(base + OVERFLOWS + 16 * (WARPGROUPS * slot + warpgroup) + 4 * thread.warp, overflowed);
    barrier_arrive(base + DONE + 8 * slot, thread.elected);
  }
}

extern "C" __global__ void __launch_bounds__(128 + COMPUTE_THREADS, 1) attend(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
    const __grid_constant__ TensorMap key_tail_map, const __grid_constant__ TensorMap value_map,
    const __grid_constant__ Problem problem) {
  extern __shared__ unsigned char unaligned[];
  const u32 base = (u32)__cvta_generic_to_shared(unaligned) + 1023 & ~1023u;
  unsigned char* memory = unaligned + (base - (u32)__cvta_generic_to_shared(unaligned));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(base + LOADED + 8 * stage, 1);
      barrier_init(base + KEYS_FREE + 8 * stage, 4 * WARPGROUPS);  // a thread of each warp that computes
      barrier_init(base + VALUES_FREE + 8 * stage, 4 * WARPGROUPS);
    }
    for (int slot = 0; slot < SLOTS; slot++) {
      barrier_init(base + FOUND + 8 * slot, 1);
      barrier_init(base + POSTED + 8 * slot, 1);
      barrier_init(base + DONE + 8 * slot, 4 * WARPGROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
  }
  __syncthreads();
  const int role = __shfl_sync(ALL, threadIdx.x / 128, 0);
  if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 40 : 32));
    if (threadIdx.x == 0) load_items(query_map, key_map, key_tail_map, value_map, problem, memory, base);
    if (threadIdx.x == 32) find_items(problem, memory, base);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 232 : 160));
    attend_items(problem, memory, base, role - 1);
  }
}
