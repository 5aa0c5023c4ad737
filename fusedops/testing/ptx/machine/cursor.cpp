#include "cursor.h"

#include <cctype>
#include <cstring>

#include "fault.h"

namespace ptx {

namespace {

// Comments become blanks, so that lines keep their numbers.
std::string without_comments(std::string text) {
    for (size_t at = 0; at + 1 < text.size(); at++) {
        if (text[at] == '"') {
            at = text.find('"', at + 1);
            if (at == std::string::npos) break;
        } else if (text[at] == '/' && text[at + 1] == '/') {
            while (at < text.size() && text[at] != '\n') text[at++] = ' ';
        } else if (text[at] == '/' && text[at + 1] == '*') {
            size_t end = text.find("*/", at + 2);
            if (end == std::string::npos) end = text.size() - 2;
            for (; at < end + 2; at++)
                if (text[at] != '\n') text[at] = ' ';
        }
    }
    return text;
}

bool in_word(char c) { return isalnum((unsigned char)c) || strchr("_$%.:", c); }

}  // namespace

Cursor::Cursor(const std::string& text) : text_(without_comments(text)) {}

int Cursor::line() {
    for (; counted_ < at_; counted_++) line_ += text_[counted_] == '\n';
    return line_;
}

void Cursor::fail(const std::string& why) {
    throw Fault(format("PTX line %d: %s", line(), why.c_str()));
}

void Cursor::skip_space() {
    while (at_ < text_.size() && isspace((unsigned char)text_[at_])) at_++;
}

char Cursor::peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
}

bool Cursor::take(char wanted) {
    if (peek() != wanted) return false;
    at_++;
    return true;
}

void Cursor::expect(char wanted) {
    if (!take(wanted)) fail(format("expected '%c', found '%s'", wanted, text_.substr(at_, 20).c_str()));
}

std::string Cursor::word() {
    skip_space();
    size_t start = at_;
    while (at_ < text_.size() && in_word(text_[at_])) {
        if (text_[at_] == ':' && text_[at_ + 1] != ':') break;          // a label ends here
        if (text_[at_] == ':') at_++;
        at_++;
    }
    if (start == at_) fail(format("unexpected '%s'", text_.substr(at_, 20).c_str()));
    return text_.substr(start, at_ - start);
}

std::string Cursor::line_rest() {
    size_t start = at_;
    while (at_ < text_.size() && text_[at_] != '\n') at_++;
    return text_.substr(start, at_ - start);
}

void Cursor::skip_braces() {
    expect('{');
    for (int depth = 1; depth; at_++) {
        if (at_ >= text_.size()) fail("unclosed '{'");
        depth += text_[at_] == '{' ? 1 : text_[at_] == '}' ? -1 : 0;
    }
}

uint64_t Cursor::integer() {
    Operand number = literal();
    if (number.kind != Operand::Integer) fail("expected an integer");
    return number.bits;
}

Operand Cursor::literal() {
    bool minus = take('-');
    skip_space();
    size_t start = at_;
    auto goes_on = [&](char c) {                                        // a sign may follow the exponent's letter
        bool sign = (c == '+' || c == '-') && at_ > start && strchr("eE", text_[at_ - 1]) && text_[start] != '0';
        return isalnum((unsigned char)c) || c == '.' || sign;
    };
    while (at_ < text_.size() && goes_on(text_[at_])) at_++;
    std::string digits = text_.substr(start, at_ - start);
    Operand number;
    try {
        if (digits.size() > 1 && digits[0] == '0' && strchr("fF", digits[1])) {
            number.kind = Operand::Float32;
            number.bits = std::stoull(digits.substr(2), nullptr, 16) ^ (minus ? 0x80000000u : 0);
        } else if (digits.size() > 1 && digits[0] == '0' && strchr("dD", digits[1])) {
            number.kind = Operand::Float64;
            number.bits = std::stoull(digits.substr(2), nullptr, 16) ^ (minus ? 1ull << 63 : 0);
        } else if (digits.find('.') != std::string::npos) {
            double value = std::stod(digits) * (minus ? -1 : 1);
            number.kind = Operand::Float64;
            memcpy(&number.bits, &value, 8);
        } else {
            number.kind = Operand::Integer;
            if (digits.back() == 'U') digits.pop_back();
            bool binary = digits.size() > 1 && strchr("bB", digits[1]);
            size_t read = 0;
            number.bits = binary ? std::stoull(digits = digits.substr(2), &read, 2) : std::stoull(digits, &read, 0);
            if (read != digits.size()) fail("not a number: '" + digits + "'");
            if (minus) number.bits = -number.bits;
        }
    } catch (const std::logic_error&) {
        fail("not a number: '" + digits + "'");
    }
    return number;
}

void Cursor::skip_to(char end) {
    while (at_ < text_.size() && text_[at_] != end) at_++;
    expect(end);
}

}  // namespace ptx
