package hotgraph_test

// The golden wire vectors of tests/contract/vectors.json: this language's read and write them like all others.

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "hotgraph.example/go/hotgraph/v1"
)

func TestVectors(t *testing.T) {
	content, err := os.ReadFile(filepath.Join("..", "..", "..", "tests", "contract", "vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index []struct {
		Name, Type string
		Binary     []byte // base64 in the file
		JSON       string
	}
	if err := json.Unmarshal(content, &index); err != nil {
		t.Fatal(err)
	}
	if len(index) < 60 {
		t.Fatalf("only %d vectors", len(index))
	}
	for _, entry := range index {
		t.Run(entry.Name, func(t *testing.T) {
			kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(entry.Type))
			if err != nil {
				t.Fatal(err)
			}
			binary, text := entry.Binary, []byte(entry.JSON)
			fromBinary, fromJSON := kind.New().Interface(), kind.New().Interface()
			if err := proto.Unmarshal(binary, fromBinary); err != nil {
				t.Fatal(err)
			}
			if err := protojson.Unmarshal(text, fromJSON); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(fromBinary, fromJSON) {
				t.Errorf("binary and JSON differ:\n%v\n%v", fromBinary, fromJSON)
			}
			for _, message := range []proto.Message{fromBinary, fromJSON} {
				// Go writes the members of a oneof last, so that the order of fields may differ, which has no meaning.
				again, err := proto.Marshal(message)
				if err != nil || len(again) != len(binary) {
					t.Errorf("binary became %x, was %x (%v)", again, binary, err)
				}
				fromAgain := kind.New().Interface()
				if err := proto.Unmarshal(again, fromAgain); err != nil || !proto.Equal(fromAgain, fromBinary) {
					t.Errorf("read again it is %v, was %v (%v)", fromAgain, fromBinary, err)
				}
			}
			written, err := protojson.Marshal(fromBinary)
			if err != nil || !reflect.DeepEqual(parsed(t, written), parsed(t, text)) {
				t.Errorf("JSON became %s, was %s (%v)", written, text, err)
			}
		})
	}
	passed(t, "vectors")
}

func parsed(t *testing.T, text []byte) any {
	t.Helper()
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatal(err)
	}
	return value
}
