// out[M, N] = epilogue(a[M, K] @ weight[N, K]^T) with a 2:4 weight, on Hopper's asynchronous units. The weight is the
// sparse operand: a warpgroup multiplies 64 of its rows with BLOCK_M rows of a and has the result transposed.
//
// A loading thread moves tiles through a ring in shared memory by TMA; two warpgroups multiply and finish 64 rows of
// the weight each. Blocks are persistent, so the loads of a tile run while the one before is finished.
#pragma once
#include "sparse_matmul_epilogue.cuh"
#include "wgmma_sparse.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace fusedops {

// Places and sizes of a block; `fusedops/ops/sparse_matmul/_cuda/wgmma.py` has the same numbers.
template <class Kind_, int BLOCK_M_> struct WgmmaTile {
    using Kind = Kind_;
    using Sum = typename Kind::Sum;
    static constexpr int BLOCK_M = BLOCK_M_, GROUP_N = 64, NUM_GROUPS = 2, BLOCK_N = GROUP_N * NUM_GROUPS;
    static constexpr int WARPGROUP = 128, NUM_THREADS = WARPGROUP * (NUM_GROUPS + 1);
    static constexpr int NUM_SUMS = BLOCK_M / 2;           // of a thread
    // A stage: of a, boxes with 128 bytes of each row; of the weight the kept half of as many columns, 64 for each box.
    static constexpr int NUM_BOXES = BLOCK_M == 256 ? 1 : 2, BLOCK_K = 128 * NUM_BOXES / Kind::BYTES;
    static constexpr int STEP_K = 64 / Kind::BYTES, NUM_STEPS = BLOCK_K / STEP_K;
    static constexpr int VALUE_ROW = 64 * NUM_BOXES, BOX_BYTES = BLOCK_M * 128;
    static constexpr int METADATA_ROW = BLOCK_K < 128 ? 16 : BLOCK_K / 8;  // TMA takes no less than 16 bytes
    static constexpr int VALUES_BYTES = BLOCK_N * VALUE_ROW, METADATA_BYTES = BLOCK_N * METADATA_ROW;
    static constexpr int A_AT = VALUES_BYTES, METADATA_AT = A_AT + NUM_BOXES * BOX_BYTES;
    static constexpr int STAGE_BYTES = METADATA_AT + METADATA_BYTES;
    // 16-bit results leave through two buffers of a warpgroup, CHUNK rows of 64 columns each.
    static constexpr int CHUNK = 32, CHUNK_BYTES = CHUNK * 128, OUT_BYTES = NUM_GROUPS * 2 * CHUNK_BYTES;
    static constexpr int SHARED_LIMIT = 227 * 1024, BARRIERS = 256;
    static constexpr int NUM_STAGES = (SHARED_LIMIT - OUT_BYTES - BARRIERS) / STAGE_BYTES;
    static_assert(STAGE_BYTES % 1024 == 0 && NUM_STAGES * 16 <= BARRIERS, "swizzled tiles start at 1024 bytes");

    static DEVICE u64 values_tile(u32 address) {
        return NUM_BOXES == 1 ? k_major_tile_64(address) : k_major_tile(address);
    }
};

// Which stage comes next, and the parity of its barriers' phase.
template <class Tile> struct Ring {
    u32 smem;
    int stage = 0;
    u32 parity = 0;

    DEVICE u32 out() const { return smem + Tile::NUM_STAGES * Tile::STAGE_BYTES; }
    DEVICE u32 tiles() const { return smem + stage * Tile::STAGE_BYTES; }
    DEVICE u32 full() const { return out() + Tile::OUT_BYTES + stage * 8; }
    DEVICE u32 empty() const { return full() + Tile::NUM_STAGES * 8; }
    DEVICE void advance() {
        if (++stage == Tile::NUM_STAGES) stage = 0, parity ^= 1;
    }
};

// Tiles of the result: `group_n` tiles of weight rows are walked through together, so that they stay in the L2 cache.
template <class Tile> struct Work {
    int M, N, K, group_n;

    DEVICE int tiles_m() const { return cdiv(M, Tile::BLOCK_M); }
    DEVICE int tiles_n() const { return cdiv(N, Tile::BLOCK_N); }
    DEVICE int num_tiles() const { return tiles_m() * tiles_n(); }
    DEVICE int num_blocks() const { return cdiv(K, Tile::BLOCK_K); }
    DEVICE void tile(int index, int& first_m, int& first_n) const {
        int in_group = group_n * tiles_m(), group = index / in_group * group_n;
        int width = min(tiles_n() - group, group_n);
        first_n = (group + index % in_group % width) * Tile::BLOCK_N;
        first_m = index % in_group / width * Tile::BLOCK_M;
    }
};

// The loading thread: every stage of every tile of this block, as places in the ring become free.
template <class Tile>
DEVICE void produce(Ring<Tile> ring, const Work<Tile>& work, const TensorMap* values_map,
                    const TensorMap* metadata_map, const TensorMap* a_map) {
    constexpr int BYTES = Tile::Kind::BYTES;
#pragma unroll 1
    for (int index = blockIdx.x; index < work.num_tiles(); index += gridDim.x) {
        int first_m, first_n;
        work.tile(index, first_m, first_n);
#pragma unroll 1
        for (int k = 0; k < work.num_blocks(); k++) {
            mbarrier_wait(ring.empty(), ring.parity ^ 1);
            mbarrier_arrive_expect(ring.full(), Tile::STAGE_BYTES);
            tma_load_2d(ring.tiles(), values_map, k * (Tile::VALUE_ROW / BYTES), first_n, ring.full());
            for (int box = 0; box < Tile::NUM_BOXES; box++)
                tma_load_2d(ring.tiles() + Tile::A_AT + box * Tile::BOX_BYTES, a_map,
                            k * Tile::BLOCK_K + box * (128 / BYTES), first_m, ring.full());
            tma_load_2d(ring.tiles() + Tile::METADATA_AT, metadata_map, k * Tile::BLOCK_K / 128 * 16, first_n,
                        ring.full());
            ring.advance();
        }
    }
}

// Metadata that TMA filled in beyond the weight is zero, which no pair is; the values there are zero too.
DEVICE u32 defined(u32 metadata, u32 pairs) { return metadata == 0 ? pairs : metadata; }

// The metadata of this lane for the steps of a stage, of the warp's 16 rows from `rows_smem` on; see WgmmaSparse. A
// register of 16-bit elements serves two steps, and a stage of 64 columns has one half of the 16 bytes of its rows.
template <class Tile, int COUNT> DEVICE void load_metadata(u32 (&metadata)[COUNT], u32 rows_smem, int k) {
    int lane = lane_id();
    if constexpr (Tile::Kind::BYTES == 2) {
        u32 at = rows_smem + lane / 4 * Tile::METADATA_ROW + lane % 4 * 2 + (Tile::NUM_BOXES == 1 ? k % 2 * 8 : 0);
#pragma unroll
        for (int pair = 0; pair < COUNT; pair++) {
            u32 low = defined(load_shared_u16(at + pair * 8), 0x4444);
            u32 high = defined(load_shared_u16(at + pair * 8 + 8 * Tile::METADATA_ROW), 0x4444);
            metadata[pair] = __byte_perm(low, high, 0x5410);
        }
    } else {
        u32 at = rows_smem + (lane / 4 + lane % 2 * 8) * Tile::METADATA_ROW + lane % 4 / 2 * 4;
#pragma unroll
        for (int step = 0; step < COUNT; step++)
            metadata[step] = defined(load_shared_u32(at + step * 8), 0x44444444);
    }
}

// The products of a stage: sums += values @ a^T, or without the old sums where not ADD.
template <class Tile, bool ADD> DEVICE void multiply(typename Tile::Sum (&sums)[Tile::NUM_SUMS],
                                                     const Ring<Tile>& ring, int group, int k) {
    using Kind = typename Tile::Kind;
    constexpr int M = Tile::BLOCK_M, SHARES = Kind::BYTES == 2 ? 2 : 1;
    u32 rows = group * Tile::GROUP_N + threadIdx.x % Tile::WARPGROUP / 32 * 16;
    u32 metadata[Tile::NUM_STEPS / SHARES];
    load_metadata<Tile>(metadata, ring.tiles() + Tile::METADATA_AT + rows * Tile::METADATA_ROW, k);
    u64 values = Tile::values_tile(ring.tiles() + group * Tile::GROUP_N * Tile::VALUE_ROW);
    u64 a = k_major_tile(ring.tiles() + Tile::A_AT);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::NUM_STEPS; step += 2) {  // 32 bytes of values and 64 of a, in units of 16
        u64 box = a + step / 2 * (Tile::BOX_BYTES / 16);
        if (ADD || step > 0)
            WgmmaSparse<Kind, M, 0, true>::multiply(sums, values + step * 2, box, metadata[step / SHARES]);
        else
            WgmmaSparse<Kind, M, 0, false>::multiply(sums, values + step * 2, box, metadata[step / SHARES]);
        WgmmaSparse<Kind, M, SHARES - 1, true>::multiply(sums, values + step * 2 + 2, box + 4,
                                                         metadata[(step + 1) / SHARES]);
    }
    wgmma_commit();
}

// This warp has read a stage.
DEVICE void leave(u32 empty) {
    if (lane_id() == 0) mbarrier_arrive(empty);
}

// The sums of a tile in the tensor cores' accumulators: a stage's products start while those of the last one run.
template <class Tile>
DEVICE void sum_up(typename Tile::Sum (&sums)[Tile::NUM_SUMS], Ring<Tile>& ring, int group, int num_blocks) {
    u32 last = ring.empty();
#pragma unroll
    for (int i = 0; i < Tile::NUM_SUMS; i++) sums[i] = 0;
#pragma unroll 1
    for (int k = 0; k < num_blocks; k++) {
        mbarrier_wait(ring.full(), ring.parity);
        multiply<Tile, true>(sums, ring, group, k);
        wgmma_wait<1>();
        if (k > 0) leave(last);
        last = ring.empty();
        ring.advance();
    }
    wgmma_wait<0>();
    leave(last);
}

// The same of float8, whose sums tensor cores keep few bits of: those of a stage, 128 products, are added in float. One
// warpgroup's products run while the other one adds.
template <class Tile>
DEVICE void sum_up_in_parts(float (&sums)[Tile::NUM_SUMS], Ring<Tile>& ring, int group, int num_blocks) {
    static_assert(Tile::BLOCK_K == 256, "128 products");
    float part[Tile::NUM_SUMS];
#pragma unroll
    for (int i = 0; i < Tile::NUM_SUMS; i++) sums[i] = part[i] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < num_blocks; k++) {
        mbarrier_wait(ring.full(), ring.parity);
        multiply<Tile, false>(part, ring, group, k);
        wgmma_wait<0>();
        leave(ring.empty());
        ring.advance();
#pragma unroll
        for (int i = 0; i < Tile::NUM_SUMS; i++) sums[i] += part[i];
    }
}

// 16 sums of a thread, and the scale of a's row with this lane's number: those of one chunk. Registers have no index,
// so every chunk has its own moves.
template <class Tile, int CHUNK = 0>
DEVICE float choose(float (&x)[16], const typename Tile::Sum (&sums)[Tile::NUM_SUMS],
                    const float (&scales)[Tile::BLOCK_M / 32], int chunk) {
    if constexpr (CHUNK + 1 < Tile::BLOCK_M / Tile::CHUNK) {
        if (chunk != CHUNK) return choose<Tile, CHUNK + 1>(x, sums, scales, chunk);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = sums[CHUNK * 16 + i];
    return scales[CHUNK];
}

// Where the results go: by tensor map where out_ptr is null, else straight from the registers.
struct Output {
    const TensorMap* map;
    void* out_ptr;
    int type, activation;
};

// Packed results of a warp into a buffer of CHUNK rows of 64 columns, transposed, with the 128-byte swizzle.
template <class Tile> DEVICE void stage_chunk(const float (&x)[16], u32 buffer, int type) {
    int lane = lane_id(), warp = threadIdx.x % Tile::WARPGROUP / 32;
#pragma unroll
    for (int i = 0; i < 16; i += 8) {                      // two blocks of 8 rows of a, each with 16 rows of the weight
        int row = i * 2 + lane / 16 * 8 + lane % 8, column_16 = warp * 2 + lane / 8 % 2;
        u32 packed[4];
        for (int j = 0; j < 4; j++) packed[j] = pack_two(x[i + j * 2], x[i + j * 2 + 1], type);
        stmatrix_x4_transposed(buffer + row * 128 + (column_16 ^ row % 8) * 16, packed);
    }
}

// The results of a warpgroup, one chunk of a's rows after the other.
template <class Tile>
DEVICE void finish(const typename Tile::Sum (&sums)[Tile::NUM_SUMS], const float (&scales)[Tile::BLOCK_M / 32],
                   const Column (&columns)[2], const Output& output, u32 out_smem, int group, int first_m,
                   int first_n, int M, int N) {
    int thread = threadIdx.x % Tile::WARPGROUP, lane = lane_id();
    int n = first_n + group * Tile::GROUP_N + thread / 32 * 16 + lane / 4;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::BLOCK_M / Tile::CHUNK; chunk++) {
        float x[16];
        float scale = choose<Tile>(x, sums, scales, chunk);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float row_scale = __shfl_sync(0xffffffff, scale, i / 4 * 8 + lane % 4 * 2 + i % 2);
            x[i] = Epilogue::scaled(x[i], row_scale, columns[i / 2 % 2]);
        }
        activate(x, output.activation);
        int m = first_m + chunk * Tile::CHUNK;
        if (output.out_ptr == nullptr) {
            u32 buffer = out_smem + (group * 2 + chunk % 2) * Tile::CHUNK_BYTES;
            if (thread == 0) bulk_wait_read<1>();          // the other buffer may still be on its way out
            barrier_sync(1 + group, Tile::WARPGROUP);
            stage_chunk<Tile>(x, buffer, output.type);
            fence_async_proxy();
            barrier_sync(1 + group, Tile::WARPGROUP);
            if (thread == 0) {
                tma_store_2d(output.map, first_n + group * Tile::GROUP_N, m, buffer);
                bulk_commit();
            }
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                int row = m + i / 4 * 8 + lane % 4 * 2 + i % 2, column = n + i / 2 % 2 * 8;
                if (row < M && column < N)
                    store_rounded(output.out_ptr, (long long)row * N + column, x[i], output.type);
            }
        }
    }
}

// A warpgroup: 64 rows of the weight of every tile of this block.
template <class Tile>
DEVICE void consume(Ring<Tile> ring, const Work<Tile>& work, const Epilogue& epilogue, const Output& output,
                    int group) {
    int thread = threadIdx.x % Tile::WARPGROUP, lane = lane_id();
#pragma unroll 1
    for (int index = blockIdx.x; index < work.num_tiles(); index += gridDim.x) {
        int first_m, first_n;
        work.tile(index, first_m, first_n);
        int n = first_n + group * Tile::GROUP_N + thread / 32 * 16 + lane / 4;
        Column columns[2];                                 // asked for before the products, which take longer
        float scales[Tile::BLOCK_M / 32];
#pragma unroll
        for (int i = 0; i < 2; i++) columns[i] = epilogue.column(min(n + i * 8, work.N - 1));
#pragma unroll
        for (int i = 0; i < Tile::BLOCK_M / 32; i++)
            scales[i] = epilogue.row_scale(min(first_m + i * 32 + lane, work.M - 1));
        typename Tile::Sum sums[Tile::NUM_SUMS];
        if constexpr (Tile::Kind::IN_PARTS) sum_up_in_parts<Tile>(sums, ring, group, work.num_blocks());
        else sum_up<Tile>(sums, ring, group, work.num_blocks());
        finish<Tile>(sums, scales, columns, output, ring.out(), group, first_m, first_n, work.M, work.N);
    }
    if (thread == 0) bulk_wait<0>();
}

template <class Tile>
DEVICE void sparse_matmul_wgmma(const TensorMap* values_map, const TensorMap* metadata_map, const TensorMap* a_map,
                                const Work<Tile>& work, const Epilogue& epilogue, const Output& output) {
    extern __shared__ __align__(1024) u8 ring_smem[];
    Ring<Tile> ring{shared_address(ring_smem)};
    if (threadIdx.x == 0) {
        for (; ring.stage < Tile::NUM_STAGES; ring.stage++) {
            mbarrier_init(ring.full(), 1);
            mbarrier_init(ring.empty(), Tile::NUM_GROUPS * 4);  // of each warp one thread
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    ring.stage = 0;
    int group = __shfl_sync(0xffffffff, threadIdx.x / Tile::WARPGROUP, 0);  // the same in a warp, so that ptxas sees it
    if (group == Tile::NUM_GROUPS) {
        registers_decrease<40>();
        if (threadIdx.x % Tile::WARPGROUP == 0) produce<Tile>(ring, work, values_map, metadata_map, a_map);
    } else {
        registers_increase<232>();
        consume<Tile>(ring, work, epilogue, output, group);
    }
}

}  // namespace fusedops

// One block computes a tile of BLOCK_M rows and 128 columns of the result after the other.
#define SPARSE_MATMUL_WGMMA(KIND_NAME, KIND, BLOCK_M)                                                                 \
    extern "C" __global__ void __launch_bounds__(384, 1) fusedops_sparse_matmul_wgmma_##KIND_NAME##_##BLOCK_M(        \
        const __grid_constant__ fusedops::TensorMap values_map,                                                       \
        const __grid_constant__ fusedops::TensorMap metadata_map, const __grid_constant__ fusedops::TensorMap a_map,  \
        const float* scale_a_ptr, const float* scale_b_ptr, const void* bias_ptr,                                     \
        const __grid_constant__ fusedops::TensorMap out_map, void* out_ptr, int stride_scale_a, int stride_scale_b,   \
        int M, int N, int K, int bias_type, int out_type, int activation, int group_n) {                              \
        using Tile = fusedops::WgmmaTile<fusedops::KIND, BLOCK_M>;                                                    \
        fusedops::sparse_matmul_wgmma<Tile>(                                                                          \
            &values_map, &metadata_map, &a_map, {M, N, K, group_n},                                                   \
            {scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b, bias_type},                          \
            {&out_map, out_ptr, out_type, activation});                                                               \
    }
#endif
