// What wgmma's instructions share: operands described by matrix descriptors, and what a warpgroup has in flight.
#pragma once
#include <deque>

#include "fragments.h"
#include "launch.h"

namespace ptx {

constexpr unsigned WARPS = 4;                        // of a warpgroup

// What an accumulator register reads as while a product is on its way: a NaN for f32 and for two f16.
constexpr uint32_t IN_FLIGHT = 0x7FFF7FFD;

struct WgmmaForm {                                   // what the modifiers say; kept in Instruction::number
    unsigned columns, depth, selector;
    Element a, b;
    Sum sum;
    bool sparse, ordered, a_in_registers, a_transposed, b_transposed, a_negated, b_negated;

    static WgmmaForm of(const Instruction& instruction) {
        WgmmaForm form;
        memcpy(&form, instruction.number.data(), sizeof form);
        return form;
    }
    void keep_in(Instruction& instruction) const { memcpy(instruction.number.data(), this, sizeof *this); }
};
static_assert(sizeof(WgmmaForm) <= sizeof(Instruction::number));
// Operands: list[0] accumulators, list[1] A in registers, slot[1] and slot[2] descriptors, slot[3] scale-d,
// slot[4] metadata.

// The accumulators of one warp, 16 rows, while products are added to them. [columns / 8][16][8] words.
struct Accumulators {
    const Instruction* instruction;                  // whose list[0] names the registers
    std::vector<uint32_t> words;
    uint64_t last = 0;                               // number of the last product that is added to them
    bool in_flight = false;

    bool same_registers(const Instruction& other) const;
    void take(Warp& warp);                           // from the registers, which read as IN_FLIGHT from then on
    void give_back(Warp& warp);                      // Fault: a register was written meanwhile
    bool changed(Warp& warp) const;                  // since they were given back
};

// What one warp contributes to a product.
struct Part {
    Accumulators* sums = nullptr;
    Clock known;                                     // what the warp knew when it issued the product
    alignas(16) uint8_t a[4][CORE_BYTES];            // registers of A
    uint32_t metadata[LANES];
};

// One wgmma.mma_async of a warpgroup, issued by its warps one after another.
struct Wgmma {
    const Instruction* instruction = nullptr;
    uint64_t a = 0, b = 0;                           // descriptors
    bool accumulate = false;                         // scale-d
    unsigned issued = 0;                             // warps so far, a bit each
    uint32_t tick = 0;                               // the agent's, after which its reads are over
    Part part[WARPS];
};

struct Warpgroup {
    Block* block = nullptr;
    unsigned first_warp = 0;
    std::deque<Wgmma> products;                      // issued by some warp and not yet waited for by all
    uint64_t first = 0;                              // number of products.front()
    uint64_t done = 0;                               // products before this number are computed
    uint64_t waited[WARPS] = {};                     // products that a warp knows to be done
    std::shared_ptr<Agent> agent;                    // reads the operands in shared memory

    Wgmma& numbered(uint64_t number) { return products[number - first]; }
    // Computes every product before `end`; all warps have issued them.
    void run_until(uint64_t end);
};

// Reads the operands of a product and adds it to the accumulators of the four warps.
void compute(Warpgroup& group, Wgmma& product);

}  // namespace ptx
