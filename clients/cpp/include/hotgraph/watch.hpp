// Watches: what happens, as it happens.
#pragma once

#include <memory>
#include <optional>

#include "hotgraph/iterator.hpp"
#include "hotgraph/v1/graph.pb.h"

namespace hotgraph {

class Client;

// What grpc.health.v1 tells.
enum class Health { unknown = 0, serving = 1, not_serving = 2, service_unknown = 3 };

// Items as they come: `for (const auto& item : watch)`. One thread reads, any may cancel. Its end of life ends the
// call. It may outlive its client.
template <class Item>
class Watch {
  public:
    using value_type = Item;
    class Reader;

    Watch(Watch&&) noexcept;
    Watch& operator=(Watch&&) noexcept;
    ~Watch();

    // The next item; none when the server has ended it. Throws Error, also when the server is lost: watch again then.
    std::optional<Item> next();
    StreamIterator<Watch> begin() { return StreamIterator<Watch>(*this); }
    StreamEnd end() const { return {}; }
    // Ends it; a waiting reader gets a CancelledError. From any thread.
    void cancel();

  private:
    friend class Client;
    explicit Watch(std::unique_ptr<Reader> reader);

    std::unique_ptr<Reader> reader_;
};

// Events of the graph cache, and the health of a service.
using GraphWatch = Watch<v1::GraphEvent>;
using HealthWatch = Watch<Health>;

}  // namespace hotgraph
