package dev.hotgraph.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.Gson;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.Message;
import com.google.protobuf.util.JsonFormat;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;
import org.junit.jupiter.api.Test;

/** The golden wire vectors of tests/contract/vectors.json: this language reads and writes them like all others. */
class VectorsTest {
    private record Vector(String name, String type, String binary, String json) {}

    /** Binary and JSON are the same message, which is written again as it was. */
    @Test
    @Case("vectors")
    void everyVectorIsReadAndWrittenAgain() throws Exception {
        String text = Files.readString(Path.of("..", "..", "..", "tests", "contract", "vectors.json"));
        Vector[] vectors = new Gson().fromJson(text, Vector[].class);
        assertTrue(vectors.length >= 60, vectors.length + " vectors");
        for (Vector vector : vectors) {
            check(vector);
        }
    }

    private static void check(Vector vector) throws Exception {
        Message empty = defaultOf(vector.type());
        byte[] binary = Base64.getDecoder().decode(vector.binary());
        Message fromBinary = empty.getParserForType().parseFrom(binary);
        Message.Builder builder = empty.newBuilderForType();
        JsonFormat.parser().merge(vector.json(), builder);
        Message fromJson = builder.build();
        assertEquals(fromBinary, fromJson, vector.name());
        for (Message message : new Message[] {fromBinary, fromJson}) {
            byte[] again = message.toByteArray();
            assertEquals(binary.length, again.length, vector.name());
            assertEquals(fromBinary, empty.getParserForType().parseFrom(again), vector.name());
        }
        String written = JsonFormat.printer().print(fromBinary);
        assertEquals(parsed(vector.json()), parsed(written), vector.name());
    }

    private static JsonElement parsed(String json) {
        return withFloats(JsonParser.parseString(json));
    }

    /**
     * The same with every number that is not whole as a float, which all of the contract's are: digits beyond that
     * differ.
     */
    private static JsonElement withFloats(JsonElement value) {
        if (value.isJsonObject()) {
            JsonObject object = new JsonObject();
            value.getAsJsonObject().asMap().forEach((name, member) -> object.add(name, withFloats(member)));
            return object;
        }
        if (value.isJsonArray()) {
            JsonArray array = new JsonArray();
            value.getAsJsonArray().forEach(item -> array.add(withFloats(item)));
            return array;
        }
        boolean isNumber = value.isJsonPrimitive() && value.getAsJsonPrimitive().isNumber();
        boolean isWhole = isNumber && value.getAsString().matches("-?[0-9]+");
        return isNumber && !isWhole ? new JsonPrimitive(value.getAsFloat()) : value;
    }

    /** The generated class's, such as dev.hotgraph.v1.Usage of hotgraph.v1.Usage. */
    private static Message defaultOf(String type) throws ReflectiveOperationException {
        Object found =
                Class.forName("dev." + type).getMethod("getDefaultInstance").invoke(null);
        return (Message) found;
    }
}
