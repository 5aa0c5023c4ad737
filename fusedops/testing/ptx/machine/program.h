// A kernel ready to run: every instruction is one function and the places of its operands.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "syntax.h"

namespace ptx {

using Mask = uint32_t;               // one bit for each lane of a warp
constexpr unsigned LANES = 32;
constexpr Mask ALL = ~0u;

struct Warp;
struct Instruction;

enum class Step {
    Next,    // go on with the next instruction
    Jump,    // the handler moved the lanes itself
    Wait,    // nothing was done: call again later. A handler that waits must be able to run again
    Yield,   // go on, but let another warp run first
};
// Executes an instruction for the lanes of `active` (those at this place whose guard holds; never empty).
using Handler = Step (*)(Warp&, const Instruction&, Mask active);

// Where an operand lies in the registers of a warp: LANES values of `bytes` side by side, or one Mask (a predicate).
// Constants and special registers are such places too, filled before the warp starts, so handlers need no cases.
struct Slot {
    uint32_t offset = 0;             // 0 is never given out
    uint8_t bytes = 0;               // of one lane; 0: predicate
    bool negated = false;            // "!p"
    explicit operator bool() const { return offset != 0; }
};

struct Instruction {
    Handler run = nullptr;
    Slot guard;
    std::array<Slot, 6> slot;                 // scalar operands; by convention slot[k] is operand k as written
    std::array<std::vector<Slot>, 4> list;    // vector operands, in the order written
    std::array<int64_t, 6> number{};          // offsets and modifiers, as the decode function defines them
    uint32_t target = 0;                      // of a branch
    std::vector<uint32_t> targets;            // of an indexed branch
    const Statement* statement = nullptr;
};

// A value that a slot has before the warp starts: the same in all lanes, or a special register.
struct Preset {
    Slot slot;
    uint64_t bits = 0;
    std::string special;             // "%tid.x"; empty: `bits`
};

struct Code {                        // of one kernel
    const Kernel* kernel = nullptr;
    const Module* module = nullptr;
    std::vector<Instruction> instructions;    // ends with an exit that the text need not have
    std::vector<Preset> presets;
    uint32_t register_bytes = 0;              // of one warp
    std::vector<uint32_t> parameter_offsets;  // in the parameter bank
    uint32_t parameter_bytes = 0;
    uint32_t static_shared = 0;               // dynamic shared memory starts here
    uint32_t local_bytes = 0;                 // of one thread
};

// Variables of a module in global or constant memory; they live as long as the program.
struct ModuleVariable {
    const Variable* declared;
    std::vector<uint64_t> storage;            // zero where nothing is given
    uint64_t address() const { return (uint64_t)storage.data(); }
    uint64_t bytes() const { return bytes_of(declared->type) * declared->elements; }
};

struct Program {
    Module module;
    std::vector<ModuleVariable> variables;
    std::vector<Code> codes;

    explicit Program(const std::string& text);           // throws Fault: what is not understood, and where
    const Code& find(const std::string& kernel) const;   // throws Fault
};

}  // namespace ptx
