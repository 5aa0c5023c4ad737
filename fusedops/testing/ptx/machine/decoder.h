// What an entry of the instruction table sees of a statement: its modifiers and operands, asked for one by one.
// Whatever is not asked for is an error, so an instruction is either understood wholly or refused by name.
#pragma once
#include <initializer_list>
#include <map>

#include "program.h"

namespace ptx {

struct Type {
    enum Kind { Bits, Unsigned, Signed, Float, Brain, FloatPair, BrainPair, Predicate, UnsignedPair, SignedPair };
    // Brain: bfloat16; pairs are of 16 bits each
    Kind kind = Bits;
    unsigned bytes = 0;
    bool is_integer() const { return kind <= Signed; }
    bool is_half() const { return is(Float, 2) || kind == Brain || kind == FloatPair || kind == BrainPair; }
    bool is(Kind wanted, unsigned size) const { return kind == wanted && bytes == size; }
};
constexpr Type B16{Type::Bits, 2}, B32{Type::Bits, 4}, B64{Type::Bits, 8}, U32{Type::Unsigned, 4},
    S32{Type::Signed, 4}, U64{Type::Unsigned, 8}, F32{Type::Float, 4}, F64{Type::Float, 8}, PRED{Type::Predicate, 0};

// Gives out places and knows the names of one kernel.
class Registers {
  public:
    Registers(const Program& program, Code& code);
    Slot find(const std::string& name) const;                  // a declared register; empty slot: none of that name
    Slot constant(uint64_t bits, unsigned bytes);              // bytes 0: a predicate
    Slot special(const std::string& name, unsigned bytes);
    bool symbol(const std::string& name, uint64_t& address) const;   // of a variable or a parameter, in its own space
    Slot fresh(unsigned bytes);                                // a place that no name has

  private:
    Code& code_;
    std::map<std::string, Slot> names_;
    std::map<std::string, uint64_t> symbols_;
    std::map<std::pair<uint64_t, unsigned>, Slot> constants_;
    std::map<std::pair<std::string, unsigned>, Slot> specials_;
};

class Decoder {
  public:
    Decoder(const Statement& statement, const Kernel& kernel, Registers& registers, Instruction& out,
            size_t name_parts);

    const Statement& statement;
    Instruction& out;                                          // what the decode function fills

    // Modifiers. Each that is asked for counts as understood.
    bool has(const std::string& modifier);                     // exact names only: "shared" is not "shared::cta"
    std::string one_of(std::initializer_list<const char*> choices, bool required = true);   // "" where not required
    std::string next();                                        // the first one not yet asked for; Fault: none is left
    std::string peek() const;                                  // the same, without taking it; "": none is left
    void ignore(std::initializer_list<const char*> modifiers); // they change nothing here (cache hints, .aligned, ...)
    Type type();                                               // the first type not yet asked for

    // Operands.
    size_t operands() const { return statement.operands.size(); }
    const Operand& operand(size_t index) const;                // Fault: there are fewer
    Slot read(size_t index, Type type);                        // register, number, special register or symbol
    Slot write(size_t index, Type type);                       // register; an unused place for "_"
    Slot read(const Operand& operand, Type type);
    Slot write(const Operand& operand, Type type);
    Slot loose(const Operand& operand, Type type, bool writes);   // ld, st, cvt: the register may be wider
    std::vector<Slot> read_list(size_t index, Type type);      // {a, b, ...}; a single operand is a list of one
    std::vector<Slot> write_list(size_t index, Type type);
    Slot address(const Operand& operand, int64_t& offset, bool wide = true);   // [base + offset]; wide: 64 bits
    int64_t integer(size_t index);                             // a number known now; Fault: it is a register
    bool is_integer(size_t index) const;
    bool is_predicate(size_t index) const;
    bool is_wide(size_t index) const;                          // a register of 64 bits
    bool is_register(const Operand& operand) const;
    uint32_t label(const std::string& name) const;             // the statement that a label names
    const std::vector<std::string>& branch_targets(const std::string& name) const;

    [[noreturn]] void unsupported(const std::string& why = "") const;
    void finish();                                             // Fault: a modifier that nobody asked for

  private:
    const Kernel& kernel_;
    Registers& registers_;
    std::vector<std::string> modifiers_;
    std::vector<bool> used_;
};

Type type_named(const std::string& name);                      // Fault: no such type
bool is_type(const std::string& name);

// Entries of one name, such as "add", differ by the last type of the statement.
enum class Of { AnyType, Integers, Floats, Halves };   // Floats: f32 and f64

// One instruction, or a family with one meaning.
struct Entry {
    const char* name;                 // its first parts, such as "cp.async.bulk"; the longest that fits is taken
    const char* section;              // of the PTX ISA 8.7
    void (*decode)(Decoder&);
    Of types = Of::AnyType;
};
using Table = std::vector<Entry>;

// One table for each file of instructions; instructions.cpp joins them.
Table integer_instructions();         // integer.cpp
Table carry_instructions();           // carry.cpp
Table video_instructions();           // video.cpp
Table logic_instructions();           // logic.cpp
Table floating_instructions();        // floating.cpp
Table approximation_instructions();   // approximation.cpp
Table half_instructions();            // half.cpp
Table conversion_instructions();      // conversion.cpp
Table comparison_instructions();      // comparison.cpp
Table control_instructions();         // control.cpp
Table move_instructions();            // moves.cpp
Table call_instructions();            // calls.cpp
Table memory_instructions();          // load_store.cpp
Table atomic_instructions();          // atomics.cpp
Table warp_instructions();            // warp_collectives.cpp
Table barrier_instructions();         // barriers.cpp
Table mbarrier_instructions();        // mbarrier.cpp
Table copy_instructions();            // async_copy.cpp
Table bulk_instructions();            // bulk_copy.cpp
Table tensor_instructions();          // tensor_copy.cpp
Table tensor_map_instructions();      // tensor_map.cpp
Table cluster_instructions();         // clusters.cpp
Table mma_instructions();             // mma.cpp
Table wgmma_instructions();           // wgmma.cpp
Table matrix_move_instructions();     // matrix_moves.cpp

const Entry* find_entry(const std::vector<std::string>& name, size_t& parts);   // nullptr: unknown
const Table& all_entries();

}  // namespace ptx
