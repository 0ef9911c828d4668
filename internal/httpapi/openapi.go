package httpapi

import (
	_ "embed"
	"net/http"
)

// openAPI describes the HTTP interface (OpenAPI 3.1). It is written by hand; a
// test holds it against the routes.
//
//go:embed openapi.json
var openAPI []byte

func (h *httpAPI) getOpenAPI(w http.ResponseWriter, r request) error {
	WriteBody(w, r.Request, http.StatusOK, typeJSON, openAPI)
	return nil
}
