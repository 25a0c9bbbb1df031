// One generation under way.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hotgraph/iterator.hpp"
#include "hotgraph/options.hpp"
#include "hotgraph/v1/inference_service.pb.h"

namespace hotgraph {

class Client;
class Texts;

// Started, Tokens and Finished as they come: `for (const auto& event : generation)`. After a lost server it goes on
// over a new connection without the reader noticing, as Resume and ResumePolicy allow. One thread reads; any may cancel
// and ask for what came so far. Its end of life ends the call, and the server frees its place at the next step. It may
// outlive its client.
class Generation {
  public:
    using value_type = v1::GenerateResponse;

    Generation(Generation&&) noexcept;
    Generation& operator=(Generation&&) noexcept;
    ~Generation();

    // The next event; none after Finished. Throws LostError or another Error, and the same again when called again.
    std::optional<v1::GenerateResponse> next();
    // The next events; for a loop, which may be left and taken up again.
    StreamIterator<Generation> begin() { return StreamIterator<Generation>(*this); }
    StreamEnd end() const { return {}; }
    // The pieces of the first choice's text, as they come: `for (const std::string& text : generation.texts())`.
    Texts texts() &;
    Texts texts() && = delete;  // the generation must outlive the loop
    // Reads what is left: the whole answer, events already read included.
    v1::CompleteResponse result();

    // Ends it if it has not ended; a waiting reader gets a CancelledError. From any thread.
    void cancel();

    // The first and the last event, once they came.
    std::optional<v1::Started> started() const;
    std::optional<v1::Finished> finished() const;
    // The text of the first choice so far.
    std::string text() const;
    // Every choice as far as it came.
    std::vector<v1::Choice> choices() const;
    // How often another connection went on so far.
    int num_resumes() const;

  private:
    friend class Client;
    class Reader;
    explicit Generation(std::unique_ptr<Reader> reader);

    std::unique_ptr<Reader> reader_;
};

// See Generation::texts.
class Texts {
  public:
    using value_type = std::string;

    // The next piece, never empty; none after the last.
    std::optional<std::string> next();
    StreamIterator<Texts> begin() { return StreamIterator<Texts>(*this); }
    StreamEnd end() const { return {}; }

  private:
    friend class Generation;
    explicit Texts(Generation& generation) : generation_(&generation) {}

    Generation* generation_;
};

}  // namespace hotgraph
