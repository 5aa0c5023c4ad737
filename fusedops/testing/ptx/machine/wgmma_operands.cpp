// Operands of wgmma: matrices in shared memory as descriptors tell, fragments in registers. PTX ISA 9.7.15.5.
#include "wgmma.h"

namespace ptx {

namespace {

// Start, leading and stride offset in bytes (14 bits each in units of 16), and the width of a row of the swizzle.
struct Descriptor {
    uint32_t start, leading, stride, base_offset, width;

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4),
          base_offset(bits >> 49 & 7) {
        static constexpr unsigned WIDTHS[] = {16, 128, 64, 32};
        width = WIDTHS[bits >> 62];
    }

    // Offset of what lies `position` bytes into `row`. Rows go along m or n where the matrix is K-major, along k where
    // it is not; then, without swizzle, the two offsets change places.
    uint32_t offset(unsigned row, unsigned position, bool mn_major) const {
        bool exchanged = mn_major && width == 16;
        return row % 8 * width + row / 8 * (exchanged ? leading : stride) + position % width +
               position / width * (exchanged ? stride : leading);
    }
    // Swizzling permutes 16-byte units by the number of the 128-byte line that they lie in. A pattern that does not
    // start at a multiple of its size says by how many lines, in the base offset.
    uint32_t place(uint32_t offset) const {
        uint32_t address = (start + offset) & 0x3FFFF, line = (address >> 7) - base_offset;
        return address ^ (line << 4 & (width - 16));
    }
};

// Each warp reads its own rows of A, and all of B: what it reads must have been written before what it knows of.
// So a row of A is read by an agent with the clock of its warp, B by one that knows what all four warps know.
struct Readers {
    Agent of_a[WARPS], of_b;

    Readers(const Agent& group, const Wgmma& product) : of_b(group) {
        of_b.clock = product.part[0].known;
        for (const Part& part : product.part) {
            meet(of_b.clock.ticks, part.known.ticks);
            meet(of_b.clock.proxied, part.known.proxied);
        }
        of_b.clock.know(group.id, group.now());
        for (unsigned w = 0; w < WARPS; w++) {
            of_a[w].id = group.id, of_a[w].clock = product.part[w].known;
            of_a[w].clock.know(group.id, group.now());
        }
    }

  private:
    static void meet(std::vector<uint32_t>& into, const std::vector<uint32_t>& other) {
        into.resize(std::min(into.size(), other.size()));
        for (size_t i = 0; i < into.size(); i++) into[i] = std::min(into[i], other[i]);
    }
};

// A matrix copied out of shared memory, its rows one after another. Agent number row / 16 reads a row, or the only one.
class Matrix {
  public:
    Matrix(Warpgroup& group, const Wgmma& product, const Agent* agents, unsigned agents_count, uint64_t bits,
           unsigned rows, unsigned row_bytes, bool mn_major)
        : row_bytes_(row_bytes) {
        Actor actor{group.block->warps[group.first_warp].get(), product.instruction, -1, agents, true};
        Memory& memory = actor.warp->launch().memory;
        Descriptor descriptor(bits);
        unsigned piece = piece_bytes(descriptor);
        for (unsigned row = 0; row < rows; row++)
            for (unsigned at = 0; at < row_bytes; at += piece) {
                if (agents_count > 1) actor.agent = agents + row / 16;
                uint32_t offset = descriptor.offset(row, at, mn_major), first = descriptor.place(offset) & ~(piece - 1);
                const uint8_t* from = memory.at(actor, Space::Shared, first, piece, 16, Access::Read) - first;
                for (unsigned unit = 0; unit < piece; unit += 16)
                    memcpy(bytes_ + row * row_bytes + at + unit, from + descriptor.place(offset + unit), 16);
            }
    }
    const uint8_t* core(unsigned row_block, unsigned unit) {
        for (unsigned r = 0; r < CORE_ROWS; r++)
            memcpy(core_ + 16 * r, bytes_ + (8 * row_block + r) * row_bytes_ + 16 * unit, 16);
        return core_;
    }

  private:
    unsigned row_bytes_;
    uint8_t bytes_[256 * 64], core_[CORE_BYTES];

    // The most that always lies together, so that there are few accesses to check.
    unsigned piece_bytes(const Descriptor& descriptor) const {
        unsigned piece = std::min(descriptor.width, row_bytes_ & -row_bytes_);
        unsigned steps = descriptor.start | descriptor.stride;
        if (row_bytes_ > descriptor.width) steps |= descriptor.leading;
        while (steps % piece) piece /= 2;
        return piece;
    }
};

void fetch_a(Warpgroup& group, const Wgmma& product, const Readers& readers, const WgmmaForm& form, Product& out) {
    if (form.a_in_registers) {
        for (unsigned w = 0; w < WARPS; w++)
            for (unsigned r = 0; r < 4; r++) out.set_a(product.part[w].a[r], 2 * w + r % 2, r / 2);
    } else if (form.a_transposed) {
        // One access has columns of several warps here.
        Matrix matrix(group, product, &readers.of_b, 1, product.a, out.kept, 64 * 2, true);
        for (unsigned k = 0; k < out.kept / 8; k++)
            for (unsigned row = 0; row < 8; row++) out.set_a_transposed(matrix.core(k, row), row, k);
    } else {
        Matrix matrix(group, product, readers.of_a, WARPS, product.a, 64, 32, false);
        for (unsigned row = 0; row < 8; row++)
            for (unsigned k = 0; k < 2; k++) out.set_a(matrix.core(row, k), row, k);
    }
    if (form.a_negated) out.negate_a();
    if (form.sparse)
        for (unsigned w = 0; w < WARPS; w++)
            set_index(out, product.part[w].metadata, form.selector, 16 * w, true);
}

void fetch_b(Warpgroup& group, const Wgmma& product, const Readers& readers, const WgmmaForm& form, Product& out) {
    unsigned blocks = form.columns / 8, units = form.sparse ? 4 : 2;
    if (form.b_transposed) {
        Matrix matrix(group, product, &readers.of_b, 1, product.b, form.depth, form.columns * 2, true);
        for (unsigned k = 0; k < form.depth / 8; k++)
            for (unsigned n = 0; n < blocks; n++) out.set_b_transposed(matrix.core(k, n), n, k);
    } else {
        Matrix matrix(group, product, &readers.of_b, 1, product.b, form.columns, units * 16, false);
        for (unsigned n = 0; n < blocks; n++)
            for (unsigned k = 0; k < units; k++) out.set_b(matrix.core(n, k), n, k);
    }
    if (form.b_negated) out.negate_b();
}

}  // namespace

void compute(Warpgroup& group, Wgmma& product) {
    WgmmaForm form = WgmmaForm::of(*product.instruction);
    Product& operands = Product::scratch();
    operands.shape(64, form.columns, form.depth, form.a, form.b, form.sparse);
    Readers readers(*group.agent, product);
    char operand = 'A';
    try {
        fetch_a(group, product, readers, form, operands);
        operand = 'B';
        fetch_b(group, product, readers, form, operands);
    } catch (const Fault& error) {
        throw Fault(format("%s\n  operand %c of the wgmma.mma_async in PTX line %d", error.what(), operand,
                           product.instruction->statement->source.line));
    }
    product.tick = group.agent->published = group.agent->now();
    group.agent->tick();
    if (!product.accumulate)
        for (Part& part : product.part) std::fill(part.sums->words.begin(), part.sums->words.end(), 0);
    operands.add_to(form.sum, [&](unsigned row, unsigned block) {
        return product.part[row / 16].sums->words.data() + 128 * block + row % 16 * 8;
    });
}

}  // namespace ptx
