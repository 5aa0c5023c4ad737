// A place in the text of a module: characters, words and numbers, with the line for messages.
#pragma once
#include <string>

#include "syntax.h"

namespace ptx {

class Cursor {
  public:
    explicit Cursor(const std::string& text);         // comments become blanks, so that lines keep their numbers

    [[noreturn]] void fail(const std::string& why);   // Fault with the line
    int line();
    void skip_space();
    char peek();                                      // the next character that is no space; NUL at the end
    bool take(char wanted);                           // whether it came next
    void expect(char wanted);
    std::string word();                               // a name, a directive or an instruction with its modifiers
    std::string line_rest();
    void skip_to(char end);                           // and past it
    void skip_braces();
    Operand literal();                                // Integer, Float32 or Float64
    uint64_t integer();

  protected:
    std::string text_;
    size_t at_ = 0;

  private:
    size_t counted_ = 0;
    int line_ = 1;
};

}  // namespace ptx
