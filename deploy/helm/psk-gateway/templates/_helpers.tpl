{{- define "psk-gateway.name" -}}
{{- if eq .Release.Name .Chart.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "psk-gateway.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "psk-gateway.labels" -}}
{{ include "psk-gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "psk-gateway.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What the gateway and the migration have in common: who they are, and where configuration and secrets are. */}}
{{- define "psk-gateway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "psk-gateway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "psk-gateway.env" -}}
- name: PSKGW_NODE__DATA_DIR
  value: /var/lib/psk-gateway
- name: PSKGW_NODE__DRAIN_S
  value: {{ .Values.drainSeconds | quote }}
- name: PSKGW_ADMIN__BIND
  value: 0.0.0.0:9464
- name: PSKGW_REGISTRY__URL_FILE
  value: /run/secrets/psk-gateway/registry_url
- name: PSKGW_REGISTRY__MASTER_KEY_CREDENTIAL
  value: master.key
- name: CREDENTIALS_DIRECTORY
  value: /run/secrets/psk-gateway
{{- end }}

{{- define "psk-gateway.mounts" -}}
- name: config
  mountPath: /etc/psk-gateway
  readOnly: true
- name: secrets
  mountPath: /run/secrets/psk-gateway
  readOnly: true
- name: data
  mountPath: /var/lib/psk-gateway
- name: tmp
  mountPath: /tmp
{{- end }}

{{- define "psk-gateway.secretVolume" -}}
- name: secrets
  secret:
    secretName: {{ .Values.existingSecret }}
    defaultMode: 0440
    items:
      - key: master.key
        path: master.key
      - key: registry_url
        path: registry_url
- name: tmp
  emptyDir:
    sizeLimit: 64Mi
{{- end }}
