// One function for each instruction that C++ has no word for; wgmma.cuh has those of sm_90a alone. Needs no header.
#pragma once

#define DEVICE __device__ __forceinline__

namespace fusedops {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// What the TMA unit knows of a tensor: made by the driver, given to a kernel as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Addresses of shared memory are 32-bit numbers in all of these functions.
DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
DEVICE u32 lane_id() { return threadIdx.x % 32; }

// sm_80: cp.async, ldmatrix, mma.

// Copies 16 bytes, both addresses multiples of 16; where not `valid` nothing is read and zeros are written.
DEVICE void cp_async_16(u32 to_smem, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_smem), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
// Copies the first `bytes` of 16 and writes zeros for the rest; a count that is not 16 is what the end of a row needs.
DEVICE void cp_async_16_part(u32 to_smem, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_smem), "l"(from), "r"(bytes) : "memory");
}
// Copies 8 bytes, both addresses multiples of 8.
DEVICE void cp_async_8(u32 to_smem, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to_smem), "l"(from) : "memory");
}
// Ends a group: the copies of this thread since the last one.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups of this thread but the newest PENDING have arrived. Other threads' copies need a barrier after it.
template <int PENDING> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 16 bytes.
DEVICE void store_shared_4x32(u32 to_smem, const u32 (&r)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to_smem), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets of each
// matrix the elements 2 * (l % 4) and the next of row l / 4.
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 row_smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_smem)
                 : "memory");
}

// c += a @ b: c 16 x 8, a 16 rows, b as 8 rows of k ("col"). Lane l holds of c the columns 2 * (l % 4) and the next of
// row l / 4, then of row l / 4 + 8.
#define MMA(NAME, ACC, CONSTRAINT, SHAPE)                                                                             \
    DEVICE void NAME(ACC(&c)[4], const u32(&a)[4], const u32* b) {                                                    \
        asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                     : CONSTRAINT(c[0]), CONSTRAINT(c[1]), CONSTRAINT(c[2]), CONSTRAINT(c[3])                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
MMA(mma_bf16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(mma_f16, float, "+f", "m16n8k16.row.col.f32.f16.f16.f32")
MMA(mma_s8, int, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
#if __CUDA_ARCH__ >= 890
MMA(mma_e4m3, float, "+f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")
#endif
#undef MMA

// The same with twice the k, where of each four neighbours in a row of a two are kept: a has those, the metadata
// their places, 4 bits for each four columns. 16-bit elements (k = 32): the lanes 2 * SELECTOR and the next of each
// four give 16 bits of row l / 4 and, above them, 16 of row l / 4 + 8, the even lane those of the first 16 columns.
// 8-bit elements (k = 64, SELECTOR 0): each lane gives 32 bits, the lanes 0 and 1 of each four those of the first 32
// columns of row l / 4 and of row l / 4 + 8, the lanes 2 and 3 those of the other 32 columns.
#define MMA_SPARSE(NAME, ACC, CONSTRAINT, SHAPE)                                                                      \
    template <int SELECTOR = 0>                                                                                       \
    DEVICE void NAME(ACC(&c)[4], const u32(&a)[4], const u32(&b)[4], u32 metadata) {                                  \
        asm volatile("mma.sp::ordered_metadata.sync.aligned." SHAPE                                                   \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"           \
                     : CONSTRAINT(c[0]), CONSTRAINT(c[1]), CONSTRAINT(c[2]), CONSTRAINT(c[3])                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),        \
                       "r"(metadata), "n"(SELECTOR));                                                                 \
    }
MMA_SPARSE(mma_sparse_bf16, float, "+f", "m16n8k32.row.col.f32.bf16.bf16.f32")
MMA_SPARSE(mma_sparse_f16, float, "+f", "m16n8k32.row.col.f32.f16.f16.f32")
MMA_SPARSE(mma_sparse_s8, int, "+r", "m16n8k64.row.col.s32.s8.s8.s32")
#undef MMA_SPARSE

// Two bytes, and four.
DEVICE u32 load_shared_u16(u32 address) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
    return value;
}
DEVICE u32 load_shared_u32(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// Adds, and gives what was there: this thread sees what the threads that added before it had written.
DEVICE u32 atomic_add_release_acquire(u32* counter, u32 value) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

// A barrier of THREADS threads of the block: waits for them. ID 0 is what __syncthreads uses.
template <int ID, int THREADS> DEVICE void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
// Counts this thread at the barrier and goes on.
template <int ID, int THREADS> DEVICE void named_barrier_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// A barrier of so many threads whose number is known at run time.
DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// sm_90: mbarrier, fences, clusters.

// A phase completes when `arrivals` threads have arrived and the bytes that were expected have too.
DEVICE void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// The barriers that this thread has made are seen by the cluster and by TMA; a barrier of the threads follows.
DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives at a barrier of this block.
DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and adds to the bytes that copies still have to bring in this phase.
DEVICE void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the barrier that lies at the same place in the block of `rank`.
DEVICE void mbarrier_arrive_remote(u32 barrier, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(barrier), "r"(rank));
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
// Until the phase of this parity is complete; before the first phase, parity 1 counts as complete.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "wait_%=:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra wait_%=;\n\t"
                 "}" ::"r"(barrier), "r"(parity)
                 : "memory");
}
// What other blocks of the cluster did before they arrived is seen too.
DEVICE void mbarrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile("{\n\t"
                 ".reg .pred done;\n\t"
                 "wait_%=:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra wait_%=;\n\t"
                 "}" ::"r"(barrier), "r"(parity)
                 : "memory");
}
// Four 8 x 8 matrices of 16-bit elements to shared memory, transposed: lane l gives the address of column l % 8 of
// matrix l / 8, and has of each matrix the elements 2 * (l % 4) and the next of row l / 4.
DEVICE void stmatrix_x4_transposed(u32 column_smem, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column_smem),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// What this thread wrote to shared memory is seen by TMA and wgmma.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The place of this block in its cluster.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Blocks in the cluster.
DEVICE u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// A barrier of all threads of the cluster.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// From the same place in the shared memory of the block of `rank`.
DEVICE float load_remote(u32 address, u32 rank) {
    u32 remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
}

// sm_90: copies by the TMA unit.

// Copies `bytes`, a multiple of 16, and counts them at the barrier.
DEVICE void bulk_load(u32 to_smem, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     to_smem),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Copies `bytes` out, as part of a bulk group of this thread.
DEVICE void bulk_store(void* to, u32 from_smem, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from_smem), "r"(bytes)
                 : "memory");
}
// Adds floats to those in global memory, as part of a bulk group of this thread.
DEVICE void bulk_add_f32(void* to, u32 from_smem, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(from_smem), "r"(bytes)
                 : "memory");
}
// Ends a bulk group.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the copies of all bulk groups but the newest PENDING are done.
template <int PENDING> DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Until their sources in shared memory may be written again.
template <int PENDING> DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// The box of the map at column x and row y; what lies outside of the tensor is zero and counts as bytes too.
DEVICE void tma_load_2d(u32 to_smem, const TensorMap* map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(to_smem),
                 "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
// Into the same place of every block of the cluster that `blocks` has a bit for, each with its own barrier.
DEVICE void tma_load_1d_multicast(u32 to_smem, const TensorMap* map, int x, u32 barrier, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2}], [%3], %4;" ::"r"(to_smem),
                 "l"(map), "r"(x), "r"(barrier), "h"(blocks)
                 : "memory");
}
// What lies outside of the tensor is not written. Part of a bulk group of this thread.
DEVICE void tma_store_2d(const TensorMap* map, int x, int y, u32 from_smem) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(x), "r"(y), "r"(from_smem)
                 : "memory");
}
#endif

}  // namespace fusedops
