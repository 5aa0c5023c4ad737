// out = activation((a @ weight^T) * scale_a * scale_b + bias) by mma.sp, for sm_80 and newer. The compressed weight is
// the sparse operand, so a block's sums are [rows of the weight, rows of a]; they turn round on their way through
// shared memory. Sizes count bytes: what 16-bit elements do with 32 columns, 8-bit ones do with 64.
#pragma once
#include "ptx.cuh"
#include "sparse_matmul_epilogue.cuh"

namespace fusedops {

constexpr int CHUNK_BYTES = 16;                        // of one cp.async, and of a row of ldmatrix
// Of a tile, for two steps of mma.sp, each of 64 bytes of a row of a and 32 of a row of values.
constexpr int A_ROW_BYTES = 128, VALUES_ROW_BYTES = 64;

// What an element type needs of a tile: metadata, METADATA_PARTS times 8 bytes of a row and METADATA_WORDS registers
// for 16 rows; and the product.
template <typename T>
struct SparseProduct;

struct Sparse16 {
    static constexpr int ELEMENT_BYTES = 2, METADATA_PARTS = 1, METADATA_WORDS = 1;
    // One word serves both steps: the lanes 0 and 1 of each four hold those of the first, 2 and 3 of the second.
    static DEVICE u32 metadata(u32 part_smem, int row) {
        const u32 from = part_smem + (row + lane_id() / 4) * 8 + lane_id() % 4 * 2;
        return load_shared_u16(from) | load_shared_u16(from + 8 * 8) << 16;
    }
};

template <>
struct SparseProduct<BFloat16> : Sparse16 {
    typedef float Sum;
    template <int STEP>
    static DEVICE void multiply(Sum (&c)[4], const u32 (&a)[4], const u32 (&b)[4], const u32 (&metadata)[1]) {
        mma_sparse_bf16<STEP>(c, a, b, metadata[0]);
    }
};

template <>
struct SparseProduct<Half> : Sparse16 {
    typedef float Sum;
    template <int STEP>
    static DEVICE void multiply(Sum (&c)[4], const u32 (&a)[4], const u32 (&b)[4], const u32 (&metadata)[1]) {
        mma_sparse_f16<STEP>(c, a, b, metadata[0]);
    }
};

template <>
struct SparseProduct<signed char> {
    typedef int Sum;
    static constexpr int ELEMENT_BYTES = 1, METADATA_PARTS = 2, METADATA_WORDS = 2;
    // Of a step the lanes 0 and 1 of each four hold the first half of two rows, 2 and 3 the second half.
    static DEVICE u32 metadata(u32 part_smem, int row) {
        return load_shared_u32(part_smem + (row + lane_id() / 4 + lane_id() % 2 * 8) * 8 + lane_id() % 4 / 2 * 4);
    }
    template <int STEP>
    static DEVICE void multiply(Sum (&c)[4], const u32 (&a)[4], const u32 (&b)[4], const u32 (&metadata)[2]) {
        mma_sparse_s8(c, a, b, metadata[STEP]);
    }
};

// BLOCK_N rows of the weight by BLOCK_M of a; a warp has WARP_N by WARP_M of them.
template <typename T_, int BLOCK_N_, int BLOCK_M_, int WARP_N_, int WARP_M_, int STAGES_>
struct SparseTile {
    typedef T_ T;
    typedef SparseProduct<T> Product;
    static constexpr int BLOCK_N = BLOCK_N_, BLOCK_M = BLOCK_M_, WARP_N = WARP_N_, WARP_M = WARP_M_, STAGES = STAGES_;
    static constexpr int WARPS_M = BLOCK_M / WARP_M, NUM_THREADS = BLOCK_N / WARP_N * WARPS_M * WARP_SIZE;
    static constexpr int FRAGMENTS_N = WARP_N / 16, FRAGMENTS_M = WARP_M / 8;
    static constexpr int VALUES_BYTES = BLOCK_N * VALUES_ROW_BYTES, A_BYTES = BLOCK_M * A_ROW_BYTES;
    static constexpr int METADATA_PART_BYTES = BLOCK_N * 8;
    static constexpr int STAGE_BYTES = VALUES_BYTES + A_BYTES + Product::METADATA_PARTS * METADATA_PART_BYTES;
    static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / Product::ELEMENT_BYTES;
    // Of the sums, turned round: rows of a. Four more floats spread eight columns of a warp over all banks.
    static constexpr int OUT_ROW = BLOCK_N + 4;
    static_assert(BLOCK_M * OUT_ROW * 4 <= STAGES * STAGE_BYTES, "the sums lie where the tiles were");
    static_assert(NUM_THREADS % BLOCK_N == 0 || BLOCK_N % NUM_THREADS == 0, "threads copy whole rows of metadata");
};

// Where a chunk of 16 bytes lies: eight rows of a chunk, as ldmatrix reads them, are in eight different bank groups.
DEVICE u32 values_chunk(int row, int chunk) { return row * VALUES_ROW_BYTES + (chunk ^ (row >> 1 & 3)) * CHUNK_BYTES; }
DEVICE u32 a_chunk(int row, int chunk) { return row * A_ROW_BYTES + (chunk ^ (row & 7)) * CHUNK_BYTES; }

// The parameters of the kernels, in the order in which they are given.
struct SparseOperands {
    const u8* a_ptr;
    const u8* values_ptr;
    const u8* metadata_ptr;
    long long a_row_bytes;                             // from a row to the next
    int M, N, K;
};

// What one thread copies of each tile. Rows that do not exist are zeros; metadata are those of the last row, because
// zeros are not metadata.
template <typename Tile>
struct SparseLoader {
    static constexpr int A_STEP = Tile::NUM_THREADS / 8, VALUES_STEP = Tile::NUM_THREADS / 4;

    const u8 *a_gmem, *values_gmem;                    // the first row and the chunk of this thread
    long long a_step_bytes, values_step_bytes;
    const SparseOperands& operands;
    int block_n, rows_m, rows_n, values_chunks;
    bool aligned;                                      // each row of a starts at a multiple of 16 bytes

    DEVICE SparseLoader(const SparseOperands& o, int block_n, int block_m) : operands(o), block_n(block_n) {
        const int a_row = threadIdx.x / 8, values_row = threadIdx.x / 4;
        values_chunks = cdiv(o.K, 64) * 2 * Tile::Product::ELEMENT_BYTES;
        a_gmem = o.a_ptr + (block_m + a_row) * o.a_row_bytes + threadIdx.x % 8 * CHUNK_BYTES;
        const long long first_chunk = (long long)(block_n + values_row) * values_chunks;
        values_gmem = o.values_ptr + (first_chunk + threadIdx.x % 4) * CHUNK_BYTES;
        a_step_bytes = A_STEP * o.a_row_bytes;
        values_step_bytes = (long long)VALUES_STEP * values_chunks * CHUNK_BYTES;
        rows_m = o.M - block_m - a_row;
        rows_n = o.N - block_n - values_row;
        aligned = ((u64)o.a_ptr | (u64)o.a_row_bytes) % CHUNK_BYTES == 0;
    }

    DEVICE void load(int k_tile, u32 stage_smem) const {
        load_values(k_tile, stage_smem);
        load_a(k_tile, stage_smem + Tile::VALUES_BYTES);
        load_metadata(k_tile, stage_smem + Tile::VALUES_BYTES + Tile::A_BYTES);
    }

    DEVICE void load_values(int k_tile, u32 tile_smem) const {
        const u32 to_smem = tile_smem + values_chunk(threadIdx.x / 4, threadIdx.x % 4);
        const bool inside = k_tile * 4 + threadIdx.x % 4 < values_chunks;
        const u8* from = values_gmem + (long long)k_tile * VALUES_ROW_BYTES;
#pragma unroll
        for (int i = 0; i < Tile::BLOCK_N / VALUES_STEP; i++) {
            cp_async_16(to_smem + i * VALUES_STEP * VALUES_ROW_BYTES, from + i * values_step_bytes,
                        inside && i * VALUES_STEP < rows_n);
        }
    }

    DEVICE void load_a(int k_tile, u32 tile_smem) const {
        const u32 to_smem = tile_smem + a_chunk(threadIdx.x / 8, threadIdx.x % 8);
        const int left = operands.K - (k_tile * 8 + threadIdx.x % 8) * Tile::CHUNK_ELEMENTS;  // elements of the row
        const int bytes = max(min(left, Tile::CHUNK_ELEMENTS), 0) * Tile::Product::ELEMENT_BYTES;
        const u8* from = a_gmem + (long long)k_tile * A_ROW_BYTES;
        if (aligned) {
#pragma unroll
            for (int i = 0; i < Tile::BLOCK_M / A_STEP; i++) {
                cp_async_16_part(to_smem + i * A_STEP * A_ROW_BYTES, from + i * a_step_bytes,
                                 i * A_STEP < rows_m ? bytes : 0);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < Tile::BLOCK_M / A_STEP; i++) {
                copy_elements(to_smem + i * A_STEP * A_ROW_BYTES, from + i * a_step_bytes,
                              i * A_STEP < rows_m ? bytes : 0);
            }
        }
    }

    // The first `bytes` of 16, from any address of an element.
    static DEVICE void copy_elements(u32 to_smem, const u8* from, int bytes) {
        constexpr int SIZE = Tile::Product::ELEMENT_BYTES;
        u32 r[4] = {};
#pragma unroll
        for (int at = 0; at < CHUNK_BYTES; at += SIZE) {
            if (at < bytes) {
                const u32 element = SIZE == 2 ? *reinterpret_cast<const u16*>(from + at) : from[at];
                r[at / 4] |= element << at % 4 * 8;
            }
        }
        store_shared_4x32(to_smem, r);
    }

    DEVICE void load_metadata(int k_tile, u32 tile_smem) const {
        constexpr int PARTS = Tile::Product::METADATA_PARTS, COPIES = PARTS * Tile::BLOCK_N;
        const int row_bytes = cdiv(operands.K, 128) * 16;
#pragma unroll
        for (int i = 0; i < cdiv(COPIES, Tile::NUM_THREADS); i++) {
            const int copy = i * Tile::NUM_THREADS + threadIdx.x, part = copy / Tile::BLOCK_N;
            const int row = min(block_n + copy % Tile::BLOCK_N, operands.N - 1);
            if (COPIES % Tile::NUM_THREADS == 0 || copy < COPIES) {
                cp_async_8(tile_smem + copy * 8,
                           operands.metadata_ptr + (long long)row * row_bytes + (k_tile * PARTS + part) * 8);
            }
        }
    }
};

template <typename Tile>
struct SparseWarp {
    typedef typename Tile::Product Product;
    typedef typename Product::Sum Sum;

    Sum acc[Tile::FRAGMENTS_N][Tile::FRAGMENTS_M][4] = {};
    int warp_n, warp_m;

    DEVICE SparseWarp() {
        const int warp = threadIdx.x / WARP_SIZE;
        warp_n = warp / Tile::WARPS_M * Tile::WARP_N;
        warp_m = warp % Tile::WARPS_M * Tile::WARP_M;
    }

    DEVICE void multiply_tile(u32 stage_smem) {
        const u32 tile_smem = stage_smem + Tile::VALUES_BYTES + Tile::A_BYTES;
        u32 metadata[Tile::FRAGMENTS_N][Product::METADATA_WORDS];
#pragma unroll
        for (int i = 0; i < Tile::FRAGMENTS_N; i++)
#pragma unroll
            for (int word = 0; word < Product::METADATA_WORDS; word++)
                metadata[i][word] = Product::metadata(tile_smem + word * Tile::METADATA_PART_BYTES, warp_n + i * 16);
        multiply_step<0>(stage_smem, metadata);
        multiply_step<1>(stage_smem, metadata);
    }

    template <int STEP>
    DEVICE void multiply_step(u32 stage_smem, const u32 (&metadata)[Tile::FRAGMENTS_N][Product::METADATA_WORDS]) {
        const u32 lane = lane_id(), a_smem = stage_smem + Tile::VALUES_BYTES;
        u32 weight[Tile::FRAGMENTS_N][4];
#pragma unroll
        for (int i = 0; i < Tile::FRAGMENTS_N; i++)
            ldmatrix_x4(weight[i], stage_smem + values_chunk(warp_n + i * 16 + lane % 16, STEP * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < Tile::FRAGMENTS_M; j++) {
            u32 a[4];
            ldmatrix_x4(a, a_smem + a_chunk(warp_m + j * 8 + lane % 8, STEP * 4 + lane / 8));
#pragma unroll
            for (int i = 0; i < Tile::FRAGMENTS_N; i++)
                Product::template multiply<STEP>(acc[i][j], weight[i], a, metadata[i]);
        }
    }

    // To [BLOCK_M, OUT_ROW] floats.
    DEVICE void store_sums(float* out_smem) const {
        const int lane = lane_id();
#pragma unroll
        for (int i = 0; i < Tile::FRAGMENTS_N; i++)
#pragma unroll
            for (int j = 0; j < Tile::FRAGMENTS_M; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int n = warp_n + i * 16 + lane / 4 + e / 2 * 8, m = warp_m + j * 8 + lane % 4 * 2 + e % 2;
                    out_smem[m * Tile::OUT_ROW + n] = float(acc[i][j][e]);
                }
    }
};

// Eight floats of a row. Half of a warp reads its upper four first, so that each bank gives one word at a time.
DEVICE void read_eight(float (&x)[8], const float* from_smem) {
    const int flip = threadIdx.x / 4 % 2;
    const Vector16<float> first = load_16(from_smem + flip * 4), second = load_16(from_smem + 4 - flip * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = flip ? second.element[i] : first.element[i];
        x[4 + i] = flip ? first.element[i] : second.element[i];
    }
}

// Rounded once. `whole`: eight columns exist, and the row starts at a multiple of 16 bytes.
DEVICE void store_eight(void* out_ptr, long long at, const float (&x)[8], int columns, bool whole, int out_type) {
    if (!whole) {
        for (int i = 0; i < 8; i++)
            if (i < columns) store_rounded(out_ptr, at + i, x[i], out_type);
    } else if (out_type == OUT_FLOAT32) {
        float* out = static_cast<float*>(out_ptr) + at;
        store_16(out, Vector16<float>{x[0], x[1], x[2], x[3]});
        store_16(out + 4, Vector16<float>{x[4], x[5], x[6], x[7]});
    } else {
        Vector16<u32> packed;
#pragma unroll
        for (int i = 0; i < 4; i++) packed.element[i] = pack_two(x[2 * i], x[2 * i + 1], out_type);
        *reinterpret_cast<Vector16<u32>*>(static_cast<u16*>(out_ptr) + at) = packed;
    }
}

template <typename Tile>
DEVICE void finish_sums(const float* out_smem, void* out_ptr, const Epilogue& epilogue, int block_n, int block_m, int M,
                        int N, int out_type, int activation) {
    constexpr int ROW_THREADS = Tile::BLOCK_N / 8;
    const int n = threadIdx.x % ROW_THREADS * 8, columns = N - block_n - n;
    if (columns <= 0) return;
    Column column[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < columns) column[i] = epilogue.column(block_n + n + i);
    const int rows = min(M - block_m, Tile::BLOCK_M);
#pragma unroll 1
    for (int m = threadIdx.x / ROW_THREADS; m < rows; m += Tile::NUM_THREADS / ROW_THREADS) {
        float x[8];
        read_eight(x, out_smem + m * Tile::OUT_ROW + n);
        const float row_scale = epilogue.row_scale(block_m + m);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < columns) x[i] = Epilogue::scaled(x[i], row_scale, column[i]);
        activate(x, activation);
        store_eight(out_ptr, (long long)(block_m + m) * N + block_n + n, x, columns, N % 8 == 0, out_type);
    }
}

// One tile of the result. Blocks that run at the same time share operands: GROUP_N tiles of the weight's rows, then the
// next tile of a's rows.
template <typename Tile>
DEVICE void sparse_matmul_mma(const SparseOperands& operands, void* out_ptr, const Epilogue& epilogue, int out_type,
                              int activation) {
    constexpr int GROUP_N = 8;
    extern __shared__ __align__(128) u8 smem[];
    const u32 stages_smem = shared_address(smem);
    const int tiles_n = cdiv(operands.N, Tile::BLOCK_N), tiles_m = cdiv(operands.M, Tile::BLOCK_M);
    const int group = blockIdx.x / (GROUP_N * tiles_m), within = blockIdx.x % (GROUP_N * tiles_m);
    const int group_size = min(tiles_n - group * GROUP_N, GROUP_N);
    const int block_n = (group * GROUP_N + within % group_size) * Tile::BLOCK_N;
    const int block_m = within / group_size * Tile::BLOCK_M;

    const SparseLoader<Tile> loader(operands, block_n, block_m);
    const int k_tiles = cdiv(operands.K, 8 * Tile::CHUNK_ELEMENTS);
#pragma unroll
    for (int stage = 0; stage < Tile::STAGES - 1; stage++) {
        if (stage < k_tiles) loader.load(stage, stages_smem + stage * Tile::STAGE_BYTES);
        cp_async_commit();
    }
    SparseWarp<Tile> warp;
    int stage = 0, free_stage = Tile::STAGES - 1;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
        cp_async_wait<Tile::STAGES - 2>();
        __syncthreads();                               // the tile is there, and all are done with the one before it
        const int next = k_tile + Tile::STAGES - 1;
        if (next < k_tiles) loader.load(next, stages_smem + free_stage * Tile::STAGE_BYTES);
        cp_async_commit();
        warp.multiply_tile(stages_smem + stage * Tile::STAGE_BYTES);
        free_stage = stage;
        stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
    }
    __syncthreads();
    float* out_smem = reinterpret_cast<float*>(smem);
    warp.store_sums(out_smem);
    __syncthreads();
    finish_sums<Tile>(out_smem, out_ptr, epilogue, block_n, block_m, operands.M, operands.N, out_type, activation);
}

}  // namespace fusedops
