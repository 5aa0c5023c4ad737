// What stops a run: an error in the PTX, in the kernel, or in what the launch was given.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace ptx {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
    va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    std::string text(vsnprintf(nullptr, 0, pattern, arguments), '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(arguments);
    va_end(again);
    return text;
}

}  // namespace ptx
