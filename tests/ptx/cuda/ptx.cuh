// One function for each instruction that C++ has no word for. Needs no header.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 bf16;                                     // its bits
typedef u8 e4m3;
typedef signed char s8;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
DEVICE int cdiv(int a, int b) { return (a + b - 1) / b; }
DEVICE u32 lane_id() { return threadIdx.x % 32; }

// sm_80: cp.async, ldmatrix, mma.

// 16 bytes; where not `valid` nothing is read and zeros are written.
DEVICE void cp_async_16(u32 to_smem, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_smem), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void ldmatrix_x4(u32 (&r)[4], u32 row_smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_smem)
                 : "memory");
}

#define MMA(NAME, ACC, CONSTRAINT, SHAPE)                                                                             \
    DEVICE void NAME(ACC(&c)[4], const u32(&a)[4], const u32* b) {                                                    \
        asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                     : CONSTRAINT(c[0]), CONSTRAINT(c[1]), CONSTRAINT(c[2]), CONSTRAINT(c[3])                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
    }
MMA(mma_bf16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA(mma_s8, int, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
#if __CUDA_ARCH__ >= 890
MMA(mma_e4m3, float, "+f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")
#endif
#undef MMA

// a: the half of each row that is kept; metadata: of two rows, from the lanes 0 and 1 of each four.
DEVICE void mma_sparse_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(metadata));
}

DEVICE u32 atomic_add_release_acquire(u32* counter, u32 value) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
}

template <int ID, int THREADS> DEVICE void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
template <int ID, int THREADS> DEVICE void named_barrier_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

#if __CUDA_ARCH__ >= 900
// sm_90: mbarrier, fences, clusters.

DEVICE void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
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
// What this thread wrote to shared memory is seen by TMA and wgmma.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float load_remote(u32 address, u32 rank) {
    u32 remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
}

// sm_90: copies by the TMA unit.

DEVICE void bulk_load(u32 to_smem, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     to_smem),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
DEVICE void bulk_store(void* to, u32 from_smem, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from_smem), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_add_f32(void* to, u32 from_smem, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(from_smem), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void bulk_wait() {       // the copies are done
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING> DEVICE void bulk_wait_read() {  // their sources may be written again
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

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
DEVICE void tma_store_2d(const TensorMap* map, int x, int y, u32 from_smem) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(x), "r"(y), "r"(from_smem)
                 : "memory");
}
#endif
