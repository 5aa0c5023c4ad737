// From syntax to instructions: places for registers, addresses for variables, a handler for each statement.
#include "program.h"

#include <cstring>

#include "decoder.h"
#include "fault.h"
#include "warp.h"

namespace ptx {

namespace {

uint64_t aligned_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

Step leave(Warp& warp, const Instruction&, Mask active) { return warp.exit(active); }

// Places variables of one space one after another; returns the end. Those as long as the launch says come last.
uint32_t lay_out(const std::vector<const Variable*>& variables, std::map<std::string, uint64_t>& symbols,
                 uint64_t from) {
    uint64_t at = from;
    for (auto* one : variables) {
        if (one->elements == 0) continue;
        at = aligned_up(at, one->align);
        symbols[one->name] = at;
        at += bytes_of(one->type) * one->elements;
    }
    uint64_t dynamic = aligned_up(at, 1024);          // TMA with 128-byte swizzle asks for as much
    bool any_dynamic = false;
    for (auto* one : variables)
        if (one->elements == 0) symbols[one->name] = dynamic, any_dynamic = true;
    return any_dynamic ? dynamic : at;
}

}  // namespace

Registers::Registers(const Program& program, Code& code) : code_(code) {
    const Kernel& kernel = *code.kernel;
    code.register_bytes = 64;                         // so that no slot has offset 0
    for (auto& declared : kernel.registers) names_[declared.name] = fresh(bytes_of(declared.type));

    std::vector<const Variable*> shared, local, parameters;
    for (auto& one : program.module.variables)
        if (one.space == "shared") shared.push_back(&one);
    for (auto& one : kernel.variables) (one.space == "local" ? local : shared).push_back(&one);
    for (auto& one : kernel.parameters) parameters.push_back(&one);
    code.static_shared = lay_out(shared, symbols_, 0);
    code.local_bytes = lay_out(local, symbols_, 0);
    code.parameter_bytes = lay_out(parameters, symbols_, 0);
    for (auto& one : kernel.parameters) code.parameter_offsets.push_back(symbols_[one.name]);
    for (auto& one : program.variables) symbols_[one.declared->name] = one.address();
}

Slot Registers::fresh(unsigned bytes) {
    if (bytes == 1) bytes = 2;                        // the narrowest register
    unsigned size = bytes ? bytes * LANES : 64;
    Slot slot{code_.register_bytes, (uint8_t)bytes, false};
    code_.register_bytes += size;
    return slot;
}

Slot Registers::find(const std::string& name) const {
    auto found = names_.find(name);
    return found == names_.end() ? Slot() : found->second;
}

Slot Registers::constant(uint64_t bits, unsigned bytes) {
    auto [at, made] = constants_.try_emplace({bits, bytes});
    if (made) {
        at->second = fresh(bytes);
        code_.presets.push_back({at->second, bytes ? bits : bits ? ALL : 0, ""});
    }
    return at->second;
}

Slot Registers::special(const std::string& name, unsigned bytes) {
    auto [at, made] = specials_.try_emplace({name, bytes});
    if (made) {
        at->second = fresh(bytes);
        code_.presets.push_back({at->second, 0, name});
    }
    return at->second;
}

bool Registers::symbol(const std::string& name, uint64_t& address) const {
    auto found = symbols_.find(name);
    if (found == symbols_.end()) return false;
    address = found->second;
    return true;
}

Program::Program(const std::string& text) : module(parse(text)) {
    for (auto& declared : module.variables) {
        if (declared.space != "global" && declared.space != "const") continue;
        unsigned bytes = bytes_of(declared.type);
        std::vector<uint64_t> storage(aligned_up(bytes * declared.elements, 16) / 8 + 2);
        if (declared.align > 16) throw Fault("variable " + declared.name + ": alignment above 16 is not supported");
        for (size_t i = 0; i < declared.values.size(); i++)
            memcpy((uint8_t*)storage.data() + i * bytes, &declared.values[i], bytes);
        variables.push_back({&declared, std::move(storage)});
    }
    codes.reserve(module.kernels.size());
    for (auto& kernel : module.kernels) {
        Code& code = codes.emplace_back();
        code.kernel = &kernel;
        code.module = &module;
        Registers registers(*this, code);
        code.instructions.resize(kernel.statements.size() + 1);
        for (size_t i = 0; i < kernel.statements.size(); i++) {
            const Statement& statement = kernel.statements[i];
            Instruction& made = code.instructions[i];
            made.statement = &statement;
            size_t parts;
            const Entry* entry = find_entry(statement.name, parts);
            Decoder decoder(statement, kernel, registers, made, entry ? parts : 0);
            if (!entry) decoder.unsupported("unknown instruction");
            if (!statement.guard.empty()) {
                Operand guard;
                guard.name = statement.guard, guard.negated = statement.guard_negated;
                made.guard = decoder.read(guard, PRED);
            }
            entry->decode(decoder);
            decoder.finish();
        }
        code.instructions.back().run = leave;
        static const Statement end{{"exit"}, {}, "", false, "(end of the kernel)", {}};
        code.instructions.back().statement = &end;
    }
}

const Code& Program::find(const std::string& kernel) const {
    std::string known;
    for (auto& code : codes) {
        if (code.kernel->name == kernel) return code;
        known += " " + code.kernel->name;
    }
    throw Fault("no kernel " + kernel + "; there are:" + known);
}

}  // namespace ptx
