package dev.hotgraph.client;

import java.util.Iterator;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.function.Function;

/** A list of many pages as one, read as far as one goes. Each iterator begins anew. */
final class Pages<T> implements Iterable<T> {
    /** One page; nextToken is empty for the last. */
    record Page<T>(List<T> items, String nextToken) {}

    private final Function<String, Page<T>> list;

    /** list: the page of a token, the first for the empty one. Throws what the iterators throw. */
    Pages(Function<String, Page<T>> list) {
        this.list = list;
    }

    @Override
    public Iterator<T> iterator() {
        return new Iterator<>() {
            private Page<T> page = read("");
            private Iterator<T> items = page.items().iterator();

            @Override
            public boolean hasNext() {
                while (!items.hasNext() && !page.nextToken().isEmpty()) {
                    page = read(page.nextToken());
                    items = page.items().iterator();
                }
                return items.hasNext();
            }

            @Override
            public T next() {
                if (!hasNext()) {
                    throw new NoSuchElementException("the list has ended");
                }
                return items.next();
            }
        };
    }

    private Page<T> read(String token) {
        return HotgraphClient.typed(() -> list.apply(token));
    }
}
