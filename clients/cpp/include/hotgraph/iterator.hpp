// Range-for over what comes one after the other.
#pragma once

#include <cstddef>
#include <iterator>
#include <optional>
#include <utility>

namespace hotgraph {

// The end of a StreamIterator.
struct StreamEnd {};

// An input iterator over a source with `value_type` and `std::optional<value_type> next()`, which it reads from and
// does not own. Advancing blocks, and throws what next() throws.
template <class Source>
class StreamIterator {
  public:
    using iterator_category = std::input_iterator_tag;
    using value_type = typename Source::value_type;
    using difference_type = std::ptrdiff_t;
    using pointer = const value_type*;
    using reference = const value_type&;

    explicit StreamIterator(Source& source) : source_(&source), current_(source.next()) {}

    reference operator*() const { return *current_; }
    pointer operator->() const { return &*current_; }
    StreamIterator& operator++() {
        current_ = source_->next();
        return *this;
    }
    void operator++(int) { ++*this; }

    friend bool operator==(const StreamIterator& iterator, StreamEnd) { return !iterator.current_; }
    friend bool operator!=(const StreamIterator& iterator, StreamEnd) { return iterator.current_.has_value(); }

  private:
    Source* source_;
    std::optional<value_type> current_;
};

}  // namespace hotgraph
