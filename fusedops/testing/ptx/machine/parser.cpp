// PTX text to syntax.h. PTX ISA sections 4 (syntax), 5 (state spaces, types, variables) and 11 (directives).
#include <cctype>
#include <cstring>
#include <functional>

#include "cursor.h"
#include "fault.h"

namespace ptx {

std::string Statement::full_name() const {
    std::string joined;
    for (auto& part : name) joined += (joined.empty() ? "" : ".") + part;
    return joined;
}

unsigned bytes_of(const std::string& type) {
    if (type == "pred") return 0;
    if (type.size() > 2 && type.substr(type.size() - 2) == "x2") return 4;
    size_t digits = type.find_first_of("0123456789");
    if (digits == std::string::npos) throw Fault("unknown type ." + type);
    return std::stoul(type.substr(digits)) / 8;
}

namespace {

struct Scope {
    int parent = -1;
    std::map<std::string, std::string> names;   // as written to unique in the kernel
};

class Parser : Cursor {
  public:
    using Cursor::Cursor;

    Module module() {
        while (skip_space(), at_ < text_.size()) module_item();
        return std::move(module_);
    }

  private:
    int unique_ = 0;
    Module module_;
    std::vector<Scope> scopes_;
    std::vector<int> scope_of_;                 // of each statement
    Source location_;

    // ---- module level
    void module_item() {
        std::string directive = word();
        if (directive == ".version") module_.version = word();
        else if (directive == ".target") {
            module_.target = word();
            while (take(',')) word();
        } else if (directive == ".address_size") integer();
        else if (directive == ".file") file();
        else if (directive == ".section") word(), skip_braces();
        else if (directive == ".entry") kernel();
        else if (directive == ".func") function();
        else if (directive == ".visible" || directive == ".weak" || directive == ".extern" || directive == ".common")
            ;                                                           // linking: one module is all there is
        else if (is_space(directive)) variable(directive.substr(1), module_.variables);
        else if (directive == ".pragma" || directive == ".alias") skip_to(';');
        else fail("unknown directive " + directive);
    }
    static bool is_space(const std::string& directive) {
        return directive == ".shared" || directive == ".global" || directive == ".const" || directive == ".local";
    }
    void file() {
        int number = integer();
        std::string rest = line_rest();
        size_t open = rest.find('"'), close = rest.find('"', open + 1);
        if (close != std::string::npos) module_.files[number] = rest.substr(open + 1, close - open - 1);
    }
    // Functions that are only declared (vprintf, __assertfail) are known by name; others must have been inlined.
    void function() {
        while (at_ < text_.size() && text_[at_] != ';' && text_[at_] != '{') at_++;
        if (peek() == '{') fail("functions that are not inlined are not supported");
        expect(';');
    }
    // [.align n] .type name [elements] [= values] ;   several names may follow one another
    void variable(const std::string& space, std::vector<Variable>& into) {
        Variable declared;
        declared.space = space;
        unsigned pointee_align = 0;
        bool pointer = false;
        std::string part;
        while (part = word(), part[0] == '.') {
            pointer |= part == ".ptr";
            if (part == ".align") (pointer ? pointee_align : declared.align) = integer();
            else if (part != ".ptr" && part != ".attribute" && !is_space(part))
                declared.type = part.substr(1);
        }
        for (bool more = true; more; more = space != "param" && take(',') && (part = word(), true)) {
            Variable one = declared;
            one.name = part;
            if (one.align == 0) one.align = bytes_of(one.type);
            while (take('[')) {
                one.elements *= peek() == ']' ? 0 : integer();
                expect(']');
            }
            if (take('=')) initial_values(one);
            into.push_back(std::move(one));
        }
        if (space != "param") expect(';');
    }
    void initial_values(Variable& variable) {
        if (!take('{')) {
            variable.values.push_back(literal().bits);
            return;
        }
        int depth = 1;
        while (depth) {
            if (take('{')) depth++;
            else if (take('}')) depth--;
            else if (!take(',')) variable.values.push_back(literal().bits);
        }
    }

    // ---- kernels
    void kernel() {
        Kernel made;
        made.name = word();
        if (take('(')) {
            while (!take(')')) {
                if (word() != ".param") fail("expected .param");
                variable("param", made.parameters);
                take(',');
            }
        }
        while (peek() == '.') {
            std::string directive = word();
            if (directive == ".reqntid") dimensions(made.required_threads);
            else if (directive == ".reqnctapercluster") dimensions(made.required_cluster);
            else if (directive == ".explicitcluster" || directive == ".noreturn") ;
            else {
                integer();                                              // .maxntid, .minnctapersm, .maxnreg
                while (take(',')) integer();
            }
        }
        scopes_.assign(1, Scope());
        scope_of_.clear();
        location_ = Source();
        expect('{');
        block(made, 0);
        resolve(made);
        module_.kernels.push_back(std::move(made));
    }
    void dimensions(unsigned (&into)[3]) {
        into[0] = integer(), into[1] = into[2] = 1;
        for (int axis = 1; take(','); axis++) into[axis] = integer();
    }
    void block(Kernel& kernel, int scope) {
        while (!take('}')) {
            if (take('{')) {
                scopes_.push_back(Scope{scope, {}});
                block(kernel, scopes_.size() - 1);
            } else if (peek() == '\0') fail("unclosed '{'");
            else item(kernel, scope);
        }
    }
    std::string declare(int scope, const std::string& name) {
        std::string unique = scope == 0 ? name : format("%s@%d", name.c_str(), ++unique_);
        scopes_[scope].names[name] = unique;
        return unique;
    }
    void item(Kernel& kernel, int scope) {
        if (take(';')) return;
        size_t start = at_;
        if (peek() == '@') return statement(kernel, scope, start, "");
        std::string first = word();
        size_t type = first[0] == '.' ? first.find('.', 1) : std::string::npos;      // ".reg.b32", without a blank
        if (type != std::string::npos) {
            at_ -= first.size() - type;
            first.resize(type);
        }
        if (first == ".reg" || first == ".param") registers(kernel, scope);          // .param: of a call, a place too
        else if (is_space(first)) {
            size_t before = kernel.variables.size();
            variable(first.substr(1), kernel.variables);
            for (; before < kernel.variables.size(); before++)
                kernel.variables[before].name = declare(scope, kernel.variables[before].name);
        } else if (first == ".extern") ;
        else if (first == ".loc") loc();
        else if (first == ".file") file();
        else if (first == ".pragma") skip_to(';');
        else if (peek() == ':') {
            expect(':');
            std::string label = declare(scope, first);
            if (peek() == '.') {
                size_t here = at_;
                if (word() == ".branchtargets") return branch_targets(kernel, label);
                at_ = here;
            }
            kernel.labels[label] = kernel.statements.size();
        } else if (first[0] == '.') fail("unknown directive " + first);
        else statement(kernel, scope, start, first);
    }
    void registers(Kernel& kernel, int scope) {
        std::string type = word().substr(1);
        do {
            std::string name = word();
            if (take('<')) {
                uint64_t count = integer();
                expect('>');
                for (uint64_t i = 0; i < count; i++)
                    kernel.registers.push_back({type, declare(scope, name + std::to_string(i))});
            } else kernel.registers.push_back({type, declare(scope, name)});
        } while (take(','));
        expect(';');
    }
    void loc() {
        location_.file = integer();
        location_.file_line = integer();
        line_rest();
    }
    void branch_targets(Kernel& kernel, const std::string& label) {
        do kernel.branch_targets[label].push_back(word());
        while (take(','));
        expect(';');
    }
    void statement(Kernel& kernel, int scope, size_t start, std::string name) {
        Statement made;
        made.source = location_;
        made.source.line = line();
        if (name.empty()) {
            expect('@');
            made.guard_negated = take('!');
            made.guard = word();
            name = word();
        }
        for (size_t from = 0; from <= name.size();) {
            size_t dot = std::min(name.find('.', from), name.size());
            made.name.push_back(name.substr(from, dot - from));
            from = dot + 1;
        }
        if (peek() != ';') {
            do made.operands.push_back(operand());
            while (take(','));
        }
        for (size_t at = start; at < at_; at++) {
            bool blank = isspace((unsigned char)text_[at]);
            if (!blank || (!made.text.empty() && made.text.back() != ' ')) made.text += blank ? ' ' : text_[at];
        }
        expect(';');
        kernel.statements.push_back(std::move(made));
        scope_of_.push_back(scope);
    }
    Operand list(char open, char close, Operand::Kind kind) {
        Operand made;
        made.kind = kind;
        expect(open);
        while (!take(close)) {
            made.parts.push_back(operand());
            take(',');
        }
        return made;
    }
    Operand operand() {
        char next = peek();
        if (next == '{') return list('{', '}', Operand::Vector);
        if (next == '(') return list('(', ')', Operand::Vector);                     // of a call
        if (next == '[') return address();
        if (next == '-' || isdigit((unsigned char)next)) return literal();
        Operand made;
        made.negated = take('!');
        made.name = word();
        if (peek() == '+') {                                                         // symbol + offset
            expect('+');
            made.bits = integer();
        }
        if (!take('|')) return made;
        Operand pair;
        pair.kind = Operand::Pair;
        pair.parts = {made, operand()};
        return pair;
    }
    Operand address() {
        Operand made;
        made.kind = Operand::Address;
        expect('[');
        made.parts.push_back(operand());
        made.bits = made.parts[0].kind == Operand::Name ? made.parts[0].bits : 0;
        made.parts[0].bits = made.parts[0].kind == Operand::Name ? 0 : made.parts[0].bits;
        if (take('+')) made.bits += integer();
        else if (peek() == '-') made.bits += integer();
        if (take(',')) made.parts.push_back(operand());
        expect(']');
        if (peek() == '.' && word() != ".unified") fail("only .unified may follow an address");
        return made;
    }

    // ---- names
    void resolve(Kernel& kernel) {
        for (size_t i = 0; i < kernel.statements.size(); i++) {
            if (!kernel.statements[i].guard.empty()) rename(kernel.statements[i].guard, scope_of_[i]);
            for (Operand& one : kernel.statements[i].operands) resolve(one, scope_of_[i]);
        }
    }
    void resolve(Operand& operand, int scope) {
        if (operand.kind == Operand::Name) rename(operand.name, scope);
        for (Operand& part : operand.parts) resolve(part, scope);
    }
    void rename(std::string& name, int scope) {
        for (; scope >= 0; scope = scopes_[scope].parent) {
            auto found = scopes_[scope].names.find(name);
            if (found == scopes_[scope].names.end()) continue;
            name = found->second;
            return;
        }
    }
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
