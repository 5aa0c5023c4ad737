// PTX as it is written: modules, kernels and statements, with names resolved to the scope that declares them.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

struct Operand {
    enum Kind {
        Name,      // register, label, symbol or special register; `negated` for "!p"
        Integer,   // `bits` as a two's complement number of 64 bits
        Float32,   // `bits` of a 0f literal
        Float64,   // `bits` of a 0d or decimal literal
        Vector,    // {a, b, ...}: `parts`
        Address,   // [base + offset]: parts[0] is the base, `bits` the offset; [map, {x, y}]: parts[1] is the vector
        Pair,      // a|b: `parts`
    };
    Kind kind = Name;
    std::string name;
    uint64_t bits = 0;
    bool negated = false;
    std::vector<Operand> parts;
};

struct Source {
    int line = 0;          // of the PTX text
    int file = 0;          // of Module::files, from .loc; 0: unknown
    int file_line = 0;
};

struct Statement {
    std::vector<std::string> name;   // "ld.global.b32" as its parts
    std::vector<Operand> operands;
    std::string guard;               // "@p" or "@!p"; empty: none
    bool guard_negated = false;
    std::string text;                // as written, in one line
    Source source;

    std::string full_name() const;
};

struct Variable {                    // .shared, .global, .const, .local or .param
    std::string space, type, name;
    unsigned align = 0;
    uint64_t elements = 1;           // 0: as long as the launch says (.extern .shared)
    std::vector<uint64_t> values;    // initial values; missing ones are 0
};

struct Register {
    std::string type, name;
};

struct Kernel {
    std::string name;
    std::vector<Variable> parameters;
    std::vector<Variable> variables;              // .shared and .local declared inside
    std::vector<Register> registers;
    std::vector<Statement> statements;
    std::map<std::string, size_t> labels;         // to the statement that follows
    std::map<std::string, std::vector<std::string>> branch_targets;
    unsigned required_threads[3] = {0, 0, 0};     // .reqntid; 0: not said
    unsigned required_cluster[3] = {0, 0, 0};     // .reqnctapercluster
};

struct Module {
    std::string version, target;
    std::map<int, std::string> files;
    std::vector<Variable> variables;
    std::vector<Kernel> kernels;
};

unsigned bytes_of(const std::string& type);       // of one element: "b32" is 4; a predicate is 0

Module parse(const std::string& text);            // throws Fault with the line

}  // namespace ptx
