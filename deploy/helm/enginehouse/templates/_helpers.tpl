{{- define "enginehouse.selector" -}}
app.kubernetes.io/name: enginehouse
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "enginehouse.labels" -}}
{{ include "enginehouse.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
