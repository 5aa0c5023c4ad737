// Calls of the two functions that the driver provides, printf and assert. PTX ISA 9.7.12.5; the CUDA C++ guide's
// formatted output says how arguments lie in vprintf's buffer.
#include <cstring>

#include "decoder.h"
#include "launch.h"

namespace ptx {

namespace {

// Reads what generic addresses lead to, for one lane.
class Reader {
  public:
    Reader(Warp& warp, const Instruction& i, unsigned lane) : actor_{&warp, &i, (int)lane} {}

    template <class T> T value(uint64_t address) {
        T read;
        memcpy(&read, actor_.warp->launch().memory.at(actor_, Space::Generic, address, sizeof(T), sizeof(T),
                                                      Access::Read), sizeof(T));
        return read;
    }
    std::string text(uint64_t address) {
        std::string read;
        while (char next = value<char>(address++)) read += next;
        return read;
    }

  private:
    Actor actor_;
};

template <class T> std::string printed(const char* pattern, T value) {
    std::string text(snprintf(nullptr, 0, pattern, value), '\0');
    snprintf(text.data(), text.size() + 1, pattern, value);
    return text;
}

// One conversion such as "%08.3f" or "%lld"; takes its argument from the buffer, where each is aligned to its size.
std::string convert(Reader& reader, const std::string& flags, bool wide, char kind, uint64_t& at) {
    auto take = [&](unsigned bytes) {
        at = (at + bytes - 1) / bytes * bytes + bytes;
        return at - bytes;
    };
    if (strchr("di", kind)) {
        long long number = wide ? reader.value<int64_t>(take(8)) : reader.value<int32_t>(take(4));
        return printed((flags + "ll" + kind).c_str(), number);
    }
    if (strchr("uoxX", kind)) {
        unsigned long long number = wide ? reader.value<uint64_t>(take(8)) : reader.value<uint32_t>(take(4));
        return printed((flags + "ll" + kind).c_str(), number);
    }
    if (strchr("fFeEgGaA", kind)) return printed((flags + kind).c_str(), reader.value<double>(take(8)));
    if (kind == 'c') return printed((flags + kind).c_str(), reader.value<int32_t>(take(4)));
    if (kind == 'p') return printed((flags + kind).c_str(), (void*)reader.value<uint64_t>(take(8)));
    if (kind == 's') return printed((flags + kind).c_str(), reader.text(reader.value<uint64_t>(take(8))).c_str());
    throw Fault(format("printf: unknown conversion %s%c", flags.c_str(), kind));
}

std::string formatted(Reader& reader, const std::string& pattern, uint64_t arguments) {
    std::string text;
    for (size_t i = 0; i < pattern.size(); i++) {
        if (pattern[i] != '%') {
            text += pattern[i];
            continue;
        }
        size_t end = pattern.find_first_not_of("-+ #0123456789.", i + 1);
        std::string flags = pattern.substr(i, end - i);
        size_t kind = pattern.find_first_not_of("hljzt", end);
        if (end == std::string::npos || kind == std::string::npos)
            throw Fault("printf: a pattern ends within a conversion");
        bool wide = pattern.find_first_of("ljzt", end) < kind;
        text += pattern[kind] == '%' ? "%" : convert(reader, flags, wide, pattern[kind], arguments);
        i = kind;
    }
    return text;
}

Step print(Warp& warp, const Instruction& i, Mask active) {
    const uint64_t* patterns = warp.values<uint64_t>(i.list[0][0]);
    const uint64_t* arguments = warp.values<uint64_t>(i.list[0][1]);
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(active >> lane & 1)) continue;
        Reader reader(warp, i, lane);
        std::string text = formatted(reader, reader.text(patterns[lane]), arguments[lane]);
        fwrite(text.data(), 1, text.size(), stdout);
        if (i.slot[0]) warp.set(i.slot[0], lane, text.size());
    }
    fflush(stdout);
    return Step::Next;
}

Step fail(Warp& warp, const Instruction& i, Mask active) {
    unsigned lane = __builtin_ctz(active);
    Reader reader(warp, i, lane);
    auto text = [&](unsigned which) { return reader.text(warp.get(i.list[0][which], lane)); };
    Actor actor{&warp, &i, (int)lane};
    fault(actor, format("assertion failed: %s, at %s:%llu in %s", text(0).c_str(), text(1).c_str(),
                        (unsigned long long)warp.get(i.list[0][2], lane), text(3).c_str()));
}

// call (result), function, (arguments);
void call(Decoder& d) {
    d.ignore({"uni"});
    bool has_result = d.operand(0).kind == Operand::Vector;
    const std::string& name = d.operand(has_result).name;
    const Operand& arguments = d.operand(has_result + 1);
    bool prints = name == "vprintf";
    if (!prints && name != "__assertfail") d.unsupported("only vprintf and __assertfail can be called");
    for (size_t k = 0; k < arguments.parts.size(); k++)
        d.out.list[0].push_back(d.read(arguments.parts[k], !prints && k == 2 ? B32 : B64));
    if (d.out.list[0].size() != (prints ? 2 : 5)) d.unsupported("the number of arguments");
    if (has_result) d.out.slot[0] = d.write(d.operand(0).parts.at(0), B32);
    d.out.run = prints ? print : fail;
}

// Parameters of a call are declared beside it and are places like registers.
template <class T> Step move(Warp& warp, const Instruction& i, Mask active) {
    T* to = warp.values<T>(i.slot[0]);
    const T* from = warp.values<T>(i.slot[1]);
    each_lane(active, [&](unsigned lane) { to[lane] = from[lane]; });
    return Step::Next;
}

void store_argument(Decoder& d) {
    Type type = d.type();
    if (d.operand(0).kind != Operand::Address || d.operand(0).bits != 0) d.unsupported("parts of an argument");
    d.out.slot[0] = d.write(d.operand(0).parts[0], type);
    d.out.slot[1] = d.read(1, type);
    d.out.run = type.bytes == 4 ? move<uint32_t> : type.bytes == 8 ? move<uint64_t> : nullptr;
    if (!d.out.run) d.unsupported("the width of an argument");
}

}  // namespace

Table call_instructions() {
    return {
        {"call", "9.7.12.5", call},
        {"st.param", "9.7.9.11", store_argument},
    };
}

}  // namespace ptx
