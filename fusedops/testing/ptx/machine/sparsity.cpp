// 2:4 sparsity: which columns the values of A belong to. PTX ISA 9.7.14.6.1 and 9.7.14.6.2.
#include "fault.h"
#include "fragments.h"

namespace ptx {

namespace {

// 4 bits of metadata choose two of four units along k. A unit is 16 bits (half of a .tf32) or 8 bits (two of .s4, .u4).
bool wide_units(Element element) { return bits_of(element) >= 16; }
unsigned groups_of(Element element, unsigned depth) {
    return depth * bits_of(element) / (wide_units(element) ? 64 : 32);
}

// The 4 bits of a group of a row: lane 4 * (row % 8) + ... holds them. Where a row has fewer groups than the lanes of a
// quad have room for, the selector says which of the lanes count.
unsigned metadata_of(Element element, unsigned groups, const uint32_t* metadata, unsigned selector, unsigned row,
                     unsigned group) {
    unsigned lane = row % 8 * 4, half = row / 8, bit;
    if (wide_units(element)) {                       // both rows in one lane
        lane += groups == 4 ? selector : 2 * selector + group / 4;
        bit = 16 * half + group % 4 * 4;
    } else {                                         // a lane for each row
        lane += half + 2 * (groups == 8 ? selector : group / 8);
        bit = group % 8 * 4;
    }
    return metadata[lane] >> bit & 15;
}

}  // namespace

unsigned selectors(Element element, unsigned depth) {
    unsigned groups = groups_of(element, depth);
    return wide_units(element) ? (groups == 4 ? 4 : 2) : (groups == 8 ? 2 : 1);
}

void set_index(Product& product, const uint32_t* metadata, unsigned selector, unsigned first_row, bool ordered) {
    Element element = product.a_element;
    unsigned groups = groups_of(element, product.depth), of_group = product.depth / groups;
    for (unsigned row = 0; row < 16; row++) {
        unsigned kept = 0;
        auto meets = [&](unsigned k) { product.index[product.place_in_a(first_row + row, kept++)] = k; };
        for (unsigned group = 0; group < groups; group++) {
            unsigned bits = metadata_of(element, groups, metadata, selector, row, group);
            unsigned low = bits & 3, high = bits >> 2, start = group * of_group;
            bool halves = element == Element::TF32;
            if (low == high || (ordered && low > high) || (halves && (low % 2 || high != low + 1)))
                throw Fault(format("row %u of A, columns %u to %u: metadata 0x%x is not defined%s", first_row + row,
                                   start, start + of_group - 1, bits, ordered ? " (its two indices must ascend)" : ""));
            if (halves) {
                meets(start + low / 2);
            } else if (of_group == 4) {
                meets(start + low), meets(start + high);
            } else {
                meets(start + 2 * low), meets(start + 2 * low + 1);
                meets(start + 2 * high), meets(start + 2 * high + 1);
            }
        }
    }
}

}  // namespace ptx
