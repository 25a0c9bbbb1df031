// All of the client.
#pragma once

#include "hotgraph/client.hpp"      // IWYU pragma: export
#include "hotgraph/error.hpp"       // IWYU pragma: export
#include "hotgraph/generation.hpp"  // IWYU pragma: export
#include "hotgraph/iterator.hpp"    // IWYU pragma: export
#include "hotgraph/options.hpp"     // IWYU pragma: export
#include "hotgraph/watch.hpp"       // IWYU pragma: export
