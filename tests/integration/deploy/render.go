// Renders a Helm chart with Go's own text/template, which Helm uses, and those functions of Helm that this chart calls. The
// input is one JSON object: the objects that templates see, and the templates by name. The output is one document of YAML
// after the other, each behind its template's name.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
	"text/template"
)

type input struct {
	Objects   map[string]any
	Templates map[string]string
}

func indent(width int, text string) string {
	padding := strings.Repeat(" ", width)
	return padding + strings.ReplaceAll(text, "\n", "\n"+padding)
}

// A map or list has a line for each of its parts, as in Helm, so that it can stand beside others; deeper ones are JSON.
func toYaml(value any) string {
	lines := []string{}
	switch parts := value.(type) {
	case map[string]any:
		for name, part := range parts {
			lines = append(lines, encode(name)+": "+encode(part))
		}
		sort.Strings(lines)
	case []any:
		for _, part := range parts {
			lines = append(lines, "- "+encode(part))
		}
	}
	if len(lines) == 0 {
		return encode(value)
	}
	return strings.Join(lines, "\n")
}

func encode(value any) string {
	encoded, err := json.Marshal(value)
	if err != nil {
		fail(err)
	}
	return string(encoded)
}

func isEmpty(value any) bool {
	truth, ok := template.IsTrue(value)
	return !ok || !truth
}

func functions(root *template.Template) template.FuncMap {
	return template.FuncMap{
		"include": func(name string, data any) (string, error) {
			var out bytes.Buffer
			err := root.ExecuteTemplate(&out, name, data)
			return out.String(), err
		},
		"toYaml":  toYaml,
		"nindent": func(width int, text string) string { return "\n" + indent(width, text) },
		"quote":   func(value any) string { return fmt.Sprintf("%q", fmt.Sprint(value)) },
		"default": func(fallback, value any) any {
			if isEmpty(value) {
				return fallback
			}
			return value
		},
		"trunc": func(length int, text string) string {
			if len(text) > length {
				return text[:length]
			}
			return text
		},
		"trimSuffix": func(suffix, text string) string { return strings.TrimSuffix(text, suffix) },
		"sha256sum":  func(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) },
		"add":        func(a, b any) int64 { return whole(a) + whole(b) },
	}
}

func whole(value any) int64 {
	var number int64
	fmt.Sscan(fmt.Sprint(value), &number)
	return number
}

func main() {
	var given input
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		fail(err)
	}
	root := template.New("chart").Option("missingkey=error")
	root.Funcs(functions(root))
	names := make([]string, 0, len(given.Templates))
	for name, text := range given.Templates {
		template.Must(root.New(name).Parse(text))
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if strings.HasPrefix(name, "_") {
			continue
		}
		fmt.Printf("---\n# %s\n", name)
		if err := root.ExecuteTemplate(os.Stdout, name, given.Objects); err != nil {
			fail(err)
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
