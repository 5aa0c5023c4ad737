#include "decoder.h"

#include <cstring>

#include "fault.h"

namespace ptx {

namespace {

const std::map<std::string, Type>& types() {
    static const std::map<std::string, Type> all = {
        {"b8", {Type::Bits, 1}},       {"b16", {Type::Bits, 2}},      {"b32", {Type::Bits, 4}},
        {"b64", {Type::Bits, 8}},      {"b128", {Type::Bits, 16}},    {"u8", {Type::Unsigned, 1}},
        {"u16", {Type::Unsigned, 2}},  {"u32", {Type::Unsigned, 4}},  {"u64", {Type::Unsigned, 8}},
        {"s8", {Type::Signed, 1}},     {"s16", {Type::Signed, 2}},    {"s32", {Type::Signed, 4}},
        {"s64", {Type::Signed, 8}},    {"f16", {Type::Float, 2}},     {"f32", {Type::Float, 4}},
        {"f64", {Type::Float, 8}},     {"bf16", {Type::Brain, 2}},    {"f16x2", {Type::FloatPair, 4}},
        {"bf16x2", {Type::BrainPair, 4}}, {"pred", {Type::Predicate, 0}},
        {"u16x2", {Type::UnsignedPair, 4}}, {"s16x2", {Type::SignedPair, 4}},
    };
    return all;
}

double number(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

}  // namespace

bool is_type(const std::string& name) { return types().count(name); }

Type type_named(const std::string& name) {
    auto found = types().find(name);
    if (found == types().end()) throw Fault("unknown type ." + name);
    return found->second;
}

Decoder::Decoder(const Statement& statement, const Kernel& kernel, Registers& registers, Instruction& out,
                 size_t name_parts)
    : statement(statement), out(out), kernel_(kernel), registers_(registers),
      modifiers_(statement.name.begin() + name_parts, statement.name.end()), used_(modifiers_.size()) {}

// ---- modifiers
bool Decoder::has(const std::string& modifier) {
    for (size_t i = 0; i < modifiers_.size(); i++)
        if (modifiers_[i] == modifier) return used_[i] = true;
    return false;
}

std::string Decoder::one_of(std::initializer_list<const char*> choices, bool required) {
    for (size_t i = 0; i < modifiers_.size(); i++)
        for (const char* choice : choices)
            if (!used_[i] && modifiers_[i] == choice) {
                used_[i] = true;
                return choice;
            }
    if (required) unsupported();
    return "";
}

std::string Decoder::next() {
    for (size_t i = 0; i < modifiers_.size(); i++)
        if (!used_[i]) {
            used_[i] = true;
            return modifiers_[i];
        }
    unsupported();
}

std::string Decoder::peek() const {
    for (size_t i = 0; i < modifiers_.size(); i++)
        if (!used_[i]) return modifiers_[i];
    return "";
}

void Decoder::ignore(std::initializer_list<const char*> modifiers) {
    for (const char* modifier : modifiers) has(modifier);
}

Type Decoder::type() {
    for (size_t i = 0; i < modifiers_.size(); i++)
        if (!used_[i] && is_type(modifiers_[i])) {
            used_[i] = true;
            return type_named(modifiers_[i]);
        }
    unsupported("no type");
}

void Decoder::finish() {
    for (size_t i = 0; i < modifiers_.size(); i++)
        if (!used_[i]) unsupported("." + modifiers_[i]);
}

void Decoder::unsupported(const std::string& why) const {
    throw Fault(format("%s, PTX line %d: not supported: %s%s%s%s", kernel_.name.c_str(), statement.source.line,
                       statement.text.c_str(), why.empty() ? "" : " (", why.c_str(), why.empty() ? "" : ")"));
}

// ---- operands
const Operand& Decoder::operand(size_t index) const {
    if (index >= statement.operands.size()) unsupported("too few operands");
    return statement.operands[index];
}

Slot Decoder::read(size_t index, Type type) { return read(operand(index), type); }
Slot Decoder::write(size_t index, Type type) { return write(operand(index), type); }

Slot Decoder::read(const Operand& operand, Type type) {
    switch (operand.kind) {
    case Operand::Integer:
        return registers_.constant(operand.bits, type.bytes);
    case Operand::Float32:
        if (type.bytes != 4) unsupported("a 32-bit number for another width");
        return registers_.constant(operand.bits, 4);
    case Operand::Float64: {
        if (type.bytes == 8) return registers_.constant(operand.bits, 8);
        if (type.bytes != 4) unsupported("a 64-bit number for another width");
        float narrow = number(operand.bits);
        uint32_t bits;
        memcpy(&bits, &narrow, 4);
        return registers_.constant(bits, 4);
    }
    case Operand::Name: {
        Slot slot = loose(operand, type, false);
        if (slot.bytes != type.bytes) unsupported("the width of " + operand.name);
        return slot;
    }
    default:
        unsupported("an operand of this form");
    }
}

Slot Decoder::loose(const Operand& operand, Type type, bool writes) {
    if (operand.kind != Operand::Name) {
        if (writes) unsupported("an operand of this form");
        return read(operand, type);
    }
    if (writes && operand.name == "_") return registers_.fresh(type.bytes);
    if (Slot slot = registers_.find(operand.name)) {
        slot.negated = operand.negated;
        if (slot.bytes < type.bytes || (type.kind == Type::Predicate) != (slot.bytes == 0))
            unsupported("the width of " + operand.name);
        return slot;
    }
    if (writes) unsupported(operand.name + " is not a register");
    if (operand.name[0] == '%' || operand.name == "WARP_SZ") return registers_.special(operand.name, type.bytes);
    uint64_t address;
    if (!registers_.symbol(operand.name, address)) unsupported("unknown name " + operand.name);
    return registers_.constant(address + operand.bits, type.bytes);
}

Slot Decoder::write(const Operand& operand, Type type) {
    Slot slot = loose(operand, type, true);
    if (slot.bytes != type.bytes) unsupported("the width of " + operand.name);
    return slot;
}

namespace {

// f(part) of each of {a, b, ...}; a single operand is a list of one.
template <class F> std::vector<Slot> each_part(const Operand& whole, F f) {
    if (whole.kind != Operand::Vector) return {f(whole)};
    std::vector<Slot> slots;
    for (auto& part : whole.parts) slots.push_back(f(part));
    return slots;
}

}  // namespace

std::vector<Slot> Decoder::read_list(size_t index, Type type) {
    return each_part(operand(index), [&](const Operand& part) { return read(part, type); });
}

std::vector<Slot> Decoder::write_list(size_t index, Type type) {
    return each_part(operand(index), [&](const Operand& part) { return write(part, type); });
}

Slot Decoder::address(const Operand& operand, int64_t& offset, bool wide) {
    if (operand.kind != Operand::Address) unsupported("an address was expected");
    offset = operand.bits;
    const Operand& base = operand.parts[0];
    Slot slot = base.kind == Operand::Name ? registers_.find(base.name) : Slot();
    if (slot) {                                       // 32-bit registers hold shared addresses; both widths are read
        if (slot.bytes != 4 && slot.bytes != 8) unsupported("the width of " + base.name);
        return slot;
    }
    return read(base, wide ? B64 : B32);
}

bool Decoder::is_integer(size_t index) const { return operand(index).kind == Operand::Integer; }

bool Decoder::is_predicate(size_t index) const {
    const Operand& one = operand(index);
    Slot slot = one.kind == Operand::Name ? registers_.find(one.name) : Slot();
    return slot && slot.bytes == 0;
}

bool Decoder::is_wide(size_t index) const {
    const Operand& one = operand(index);
    return one.kind == Operand::Name && registers_.find(one.name).bytes == 8;
}

bool Decoder::is_register(const Operand& operand) const {
    return operand.kind == Operand::Name && registers_.find(operand.name);
}

int64_t Decoder::integer(size_t index) {
    if (!is_integer(index)) unsupported("a number was expected");
    return operand(index).bits;
}

uint32_t Decoder::label(const std::string& name) const {
    auto found = kernel_.labels.find(name);
    if (found == kernel_.labels.end()) unsupported("unknown label " + name);
    return found->second;
}

const std::vector<std::string>& Decoder::branch_targets(const std::string& name) const {
    auto found = kernel_.branch_targets.find(name);
    if (found == kernel_.branch_targets.end()) unsupported("unknown list of targets " + name);
    return found->second;
}

}  // namespace ptx
