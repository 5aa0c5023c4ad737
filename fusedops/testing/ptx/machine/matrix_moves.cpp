// Core matrices between shared memory and registers: ldmatrix, stmatrix, movmatrix. PTX ISA 9.7.14.5.
// A register of a warp holds 8 rows of 16 bytes one after another: a matrix that is not transposed is copied as it is.
#include "fragments.h"
#include "launch.h"

namespace ptx {

namespace {

enum { Offset, SpaceOf, Transposed };                // instruction.number

void transpose(const uint16_t* from, uint16_t* to) {
    for (unsigned r = 0; r < 8; r++)
        for (unsigned c = 0; c < 8; c++) to[8 * c + r] = from[8 * r + c];
}

// Lanes 8m to 8m + 7 give the addresses of the rows of matrix m.
void rows_of(Warp& warp, const Instruction& i, Access access, uint8_t* (&places)[LANES]) {
    Mask lanes = ALL >> (LANES - 8 * i.list[0].size());
    uint64_t addresses[LANES];
    lane_addresses(warp, i.slot[0], i.number[Offset], lanes, addresses);
    warp.launch().memory.at(Actor{&warp, &i}, lanes, (Space)i.number[SpaceOf], addresses, CORE_ROW_BYTES,
                            CORE_ROW_BYTES, access, places);
}

Step load(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    uint8_t* rows[LANES];
    rows_of(warp, i, Access::Read, rows);
    for (unsigned m = 0; m < i.list[0].size(); m++) {
        uint8_t* to = warp.values<uint8_t>(i.list[0][m]);
        uint16_t matrix[64];
        uint8_t* into = i.number[Transposed] ? (uint8_t*)matrix : to;
        for (unsigned r = 0; r < CORE_ROWS; r++) memcpy(into + r * CORE_ROW_BYTES, rows[8 * m + r], CORE_ROW_BYTES);
        if (i.number[Transposed]) transpose(matrix, (uint16_t*)to);
    }
    return Step::Next;
}

Step store(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    uint8_t* rows[LANES];
    rows_of(warp, i, Access::Write, rows);
    for (unsigned m = 0; m < i.list[0].size(); m++) {
        uint16_t matrix[64];
        const uint16_t* from = warp.values<uint16_t>(i.list[0][m]);
        if (i.number[Transposed]) transpose(from, matrix), from = matrix;
        for (unsigned r = 0; r < CORE_ROWS; r++) memcpy(rows[8 * m + r], from + 8 * r, CORE_ROW_BYTES);
    }
    return Step::Next;
}

Step move(Warp& warp, const Instruction& i, Mask active) {
    if (Step s = warp.aligned(i, active); s != Step::Next) return s;
    uint16_t from[64];
    memcpy(from, warp.values<uint16_t>(i.slot[1]), CORE_BYTES);
    transpose(from, warp.values<uint16_t>(i.slot[0]));
    return Step::Next;
}

void form(Decoder& d, size_t address, const std::vector<Slot>& registers) {
    d.ignore({"sync", "aligned"});
    std::string shape = d.next();
    if (shape != "m8n8") d.unsupported("." + shape + " needs sm_100a");
    std::string count = d.one_of({"x1", "x2", "x4"});
    if (registers.size() != (size_t)(count[1] - '0')) d.unsupported("." + count + " with another number of registers");
    d.out.list[0] = registers;
    d.out.number[Transposed] = d.has("trans");
    bool shared = !d.one_of({"shared", "shared::cta"}, false).empty();
    d.out.number[SpaceOf] = (int64_t)(shared ? Space::Shared : Space::Generic);
    d.out.slot[0] = d.address(d.operand(address), d.out.number[Offset]);
    d.one_of({"b16"});
}

void ldmatrix(Decoder& d) {
    form(d, 1, d.write_list(0, B32));
    d.out.run = load;
}

void stmatrix(Decoder& d) {
    form(d, 0, d.read_list(1, B32));
    d.out.run = store;
}

void movmatrix(Decoder& d) {
    d.ignore({"sync", "aligned"});
    d.one_of({"m8n8"});
    d.one_of({"trans"});
    d.one_of({"b16"});
    d.out.slot[0] = d.write(0, B32);
    d.out.slot[1] = d.read(1, B32);
    d.out.run = move;
}

}  // namespace

Table matrix_move_instructions() {
    return {
        {"ldmatrix", "9.7.14.5.15", ldmatrix},
        {"stmatrix", "9.7.14.5.16", stmatrix},
        {"movmatrix", "9.7.14.5.17", movmatrix},
    };
}

}  // namespace ptx
