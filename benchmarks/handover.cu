// The hand-over of sparse_cores.cu alone, for compute-sanitizer --tool racecheck: which of its parts the tool does not follow.
//
// A finder writes mail, a relay tells readers that it is there, all readers read it, and the finder writes the next mail
// into the same place when they are done. All of it is ordered by mbarriers, so there is no race, except in `broken`.
//
//   nvcc -arch=sm_90a -lineinfo -o handover handover.cu && compute-sanitizer --tool racecheck ./handover
#include <cstdio>

typedef unsigned int u32;
constexpr int SLOTS = 2, POSTS = 64, WORDS = 20, READERS = 64;

__device__ __forceinline__ void init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}\n" ::"r"(barrier),
               "r"(parity) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

struct Mail {
  int words[WORDS];
};

// RELAYED: readers wait for the relay, not for the finder. ELECTED: a lane arrives for its warp, after __syncwarp.
// EARLY: readers say that they are done before they read.
template <bool RELAYED, bool ELECTED, bool EARLY>
__device__ __forceinline__ void hand_over(int* sums) {
  __shared__ alignas(8) unsigned long long barriers[3 * SLOTS];
  __shared__ Mail mails[SLOTS];
  const u32 found = (u32)__cvta_generic_to_shared(barriers), posted = found + 8 * SLOTS, done = posted + 8 * SLOTS;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; slot++) {
      init(found + 8 * slot, 1);
      init(posted + 8 * slot, 1);
      init(done + 8 * slot, ELECTED ? READERS / 32 : READERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0 && lane == 0) {  // the relay
    for (int post = 0; post < POSTS; post++) {
      const int slot = post % SLOTS;
      wait(found + 8 * slot, post / SLOTS & 1);
      arrive(posted + 8 * slot);
    }
  } else if (warp == 1 && lane == 0) {  // the finder
    for (int post = 0; post < POSTS; post++) {
      const int slot = post % SLOTS;
      wait(done + 8 * slot, (post / SLOTS & 1) ^ 1);
      Mail mail;
      for (int i = 0; i < WORDS; i++) mail.words[i] = post + i;
      mails[slot] = mail;
      arrive(found + 8 * slot);
    }
  } else if (warp >= 2) {  // readers
    int sum = 0;
    for (int post = 0; post < POSTS; post++) {
      const int slot = post % SLOTS;
      wait((RELAYED ? posted : found) + 8 * slot, post / SLOTS & 1);
      if (EARLY) arrive(done + 8 * slot);
      const Mail mail = mails[slot];
      for (int i = 0; i < WORDS; i++) sum += mail.words[i];
      __syncwarp();
      if (!EARLY && (!ELECTED || lane == 0)) arrive(done + 8 * slot);
    }
    sums[threadIdx.x - 64] = sum;
  }
}

extern "C" __global__ void direct_all_arrive(int* sums) { hand_over<false, false, false>(sums); }
extern "C" __global__ void direct_one_arrives(int* sums) { hand_over<false, true, false>(sums); }
extern "C" __global__ void relayed_all_arrive(int* sums) { hand_over<true, false, false>(sums); }
extern "C" __global__ void as_in_sparse_cores(int* sums) { hand_over<true, true, false>(sums); }
extern "C" __global__ void broken(int* sums) { hand_over<true, false, true>(sums); }

int main() {
  int *sums, found[READERS], expected = 0;
  for (int post = 0; post < POSTS; post++)
    for (int i = 0; i < WORDS; i++) expected += post + i;
  cudaMalloc(&sums, sizeof(found));
  void (*kernels[])(int*) = {direct_all_arrive, direct_one_arrives, relayed_all_arrive, as_in_sparse_cores, broken};
  for (auto kernel : kernels) {
    kernel<<<1, 64 + READERS>>>(sums);
    cudaMemcpy(found, sums, sizeof(found), cudaMemcpyDeviceToHost);
    int wrong = 0;
    for (int sum : found) wrong += sum != expected;
    printf("%d wrong, %s\n", wrong, cudaGetErrorString(cudaGetLastError()));
  }
}
